"""Pipeline stages: the layers that this process holds, and what travels from one stage to the next.

Upstream's schedules send one tensor [S, B, width] forward and its gradient back. The value residual needs layer 1's
values in every layer, so they ride along: concatenated to the hidden states, with the gradient of all later layers.

Shapes: S sequence, B batch, H hidden, G KV groups, D head dim.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import cast

import torch
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor

from megatron_vpmoe.model.layer_specs import layer_spec
from megatron_vpmoe.model.transformer_config import VPTransformerConfig


@dataclass(frozen=True)
class Stage:
    """A place in the pipeline.

    Attributes:
        index: from 0.
        count: stages in the pipeline.
        layers: global numbers (from 1) of its layers.
    """

    index: int
    count: int
    layers: range

    @classmethod
    def of(cls, config: VPTransformerConfig, group: torch.distributed.ProcessGroup) -> Stage:
        """The stage of this process in its pipeline."""
        index = group.rank()
        offset = get_transformer_layer_offset(config, None, index)
        return cls(index, group.size(), range(offset + 1, offset + 1 + get_num_layers_to_build(config, pp_rank=index)))

    @property
    def is_first(self) -> bool:
        """Whether it embeds the tokens."""
        return self.index == 0

    @property
    def is_last(self) -> bool:
        """Whether it projects to the vocabulary."""
        return self.index == self.count - 1


@dataclass(frozen=True)
class Wire:
    """What travels between stages: the residual stream, and layer 1's values where there is a value residual.

    Under tensor parallelism a rank sends its groups' values, and under sequence parallelism its part of the residual
    stream, S / T positions, with the values of all S positions folded into T times the width.

    Attributes:
        hidden_size: H.
        value_shape: (G, D) of layer 1's values on this rank; None if they stay at home.
        sequence_shards: T under sequence parallelism, otherwise 1.
    """

    hidden_size: int
    value_shape: tuple[int, int] | None
    sequence_shards: int = 1

    @classmethod
    def of(cls, config: VPTransformerConfig) -> Wire:
        """The wire of a configuration."""
        ranks = config.tensor_model_parallel_size
        groups, head_dim = cast(int, config.num_query_groups) // ranks, cast(int, config.kv_channels)
        shape = (groups, head_dim) if config.value_residual else None
        return cls(config.hidden_size, shape, ranks if config.sequence_parallel else 1)

    @property
    def width(self) -> int:
        """Last dimension of the tensor that travels."""
        return self.hidden_size + (self.sequence_shards * math.prod(self.value_shape) if self.value_shape else 0)

    def pack(self, hidden_SBH: Tensor, first_value_SBGD: Tensor | None) -> Tensor:
        """One contiguous tensor [S, B, width].

        Raises:
            ValueError: the values are missing, or of another dtype than the hidden states: the receiver would misread.
        """
        if self.value_shape is None:
            return hidden_SBH
        if first_value_SBGD is None or first_value_SBGD.dtype != hidden_SBH.dtype:
            kind = None if first_value_SBGD is None else first_value_SBGD.dtype
            raise ValueError(f"layer 1's values must travel as {hidden_SBH.dtype}, and are {kind}")
        return torch.cat([hidden_SBH, first_value_SBGD.reshape(*hidden_SBH.shape[:2], -1)], dim=-1)

    def unpack(self, received: Tensor) -> tuple[Tensor, Tensor | None]:
        """The inverse of ``pack``; gradients into both parts come out as one tensor."""
        if self.value_shape is None:
            return received, None
        hidden_SBH, values = received.split([self.hidden_size, self.width - self.hidden_size], dim=-1)
        return hidden_SBH.contiguous(), values.reshape(-1, received.shape[1], *self.value_shape)

    def adjust_shapes(self, receive: list[tuple], send: list[tuple]) -> tuple[list[tuple], list[tuple]]:
        """Upstream's shapes [S, B, H] of what a stage receives and sends, at this wire's width."""
        wide = [[(*shape[:-1], self.width) for shape in shapes] for shapes in (receive, send)]
        return wide[0], wide[1]


def draw_preceding_weights(
    config: VPTransformerConfig, stage: Stage, vocab_size: int, pg_collection: ProcessGroupCollection
) -> Tensor | None:
    """Draw the initial weights of everything before ``stage`` and drop them, a layer at a time.

    Every rank starts from one seed, and one process would draw embedding, layers, output layer in this order: so each
    stage's weights are those of the one-process model.

    Returns:
        the embedding's weight, for the last stage of a model that ties its output layer; None on the first stage, and
        where nothing is initialised.
    """
    if stage.is_first or not config.perform_initialization:
        return None
    whole = copy.copy(config)
    whole.pipeline_model_parallel_size = 1
    embedding = LanguageModelEmbedding(
        config=whole,
        vocab_size=vocab_size,
        max_sequence_length=0,
        position_embedding_type="none",
        tp_group=pg_collection.tp,
    )
    for number in range(1, stage.layers.start):
        build_module(layer_spec(whole, number), config=whole, layer_number=number, pg_collection=pg_collection)
    return embedding.word_embeddings.weight.detach()
