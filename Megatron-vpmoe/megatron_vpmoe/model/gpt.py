"""The language model: embedding, stack of layers, output projection.

Over tensor-parallel ranks the vocabulary is split; outside the stack every rank holds every position, also under
sequence parallelism.

Shapes: B batch, S sequence, H hidden, V padded vocabulary, T tensor-parallel ranks.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer.enums import ModelType
from torch import Tensor

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.block import VPTransformerBlock
from megatron_vpmoe.model.layer_specs import block_spec
from megatron_vpmoe.model.moe.real_tokens import RealTokens
from megatron_vpmoe.model.output import ModelOutput
from megatron_vpmoe.model.pipeline import Stage, Wire, draw_preceding_weights
from megatron_vpmoe.model.transformer_config import VPTransformerConfig
from megatron_vpmoe.runtime.ranges import annotated
from megatron_vpmoe.think.diffuser import Diffuser
from megatron_vpmoe.think.scale import Scale


class VPModel(LanguageModule):
    """The student at any rung: embedding -> layers -> norm -> output projection; of a pipeline, one stage of it.

    Args:
        config: the transformer's configuration.
        vocab_size: padded vocabulary V.
        share_embeddings_and_output_weights: tie the output projection to the embedding.
        pg_collection: process groups; None takes Megatron-Core's global ones.
    """

    def __init__(
        self,
        config: VPTransformerConfig,
        vocab_size: int,
        *,
        share_embeddings_and_output_weights: bool = False,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.vocab_size = vocab_size
        self.stage = Stage.of(config, self.pg_collection.pp)
        self._received: Tensor | None = None
        self.share_embeddings_and_output_weights = share_embeddings_and_output_weights
        # Read by Megatron-Core's LanguageModule and schedules.
        self.pre_process, self.post_process = self.stage.is_first, self.stage.is_last
        self.model_type = ModelType.encoder_or_decoder
        self._embedding_of_first_stage = draw_preceding_weights(config, self.stage, vocab_size, self.pg_collection)
        if self.pre_process:
            self.embedding = LanguageModelEmbedding(
                config=config,
                vocab_size=vocab_size,
                max_sequence_length=0,
                position_embedding_type="none",
                tp_group=self.pg_collection.tp,
            )
        self.decoder: Any = self._layers(config)
        if self.post_process:
            # Objectives choose positions before the projection, so its input is whole and never to be gathered.
            whole = copy.copy(config)
            whole.sequence_parallel = False
            self.output_layer = tensor_parallel.ColumnParallelLinear(
                config.hidden_size,
                vocab_size,
                config=whole,
                init_method=cast("Callable[[Tensor], Tensor]", config.init_method),
                bias=False,
                skip_weight_param_allocation=share_embeddings_and_output_weights and self.pre_process,
                tp_group=self.pg_collection.tp,
            )
        self.setup_embeddings_and_output_layer()
        del self._embedding_of_first_stage

    def _layers(self, config: VPTransformerConfig) -> torch.nn.Module:
        """What lies between the embedding and the output projection."""
        if config.layer_type == "denoiser":
            return Diffuser.of(config)
        return VPTransformerBlock(
            config=config,
            spec=block_spec(config, self.stage.layers),
            pre_process=self.pre_process,
            post_process=self.post_process,
            pg_collection=self.pg_collection,
        )

    def setup_embeddings_and_output_layer(self) -> None:
        """Mark embedding and output layer for upstream; of a tied pair on two stages the last one gets its copy here.

        Upstream's way to the copy is an all-reduce on the GPU before the model is there.
        """
        if not self.share_embeddings_and_output_weights or self.stage.count == 1:
            super().setup_embeddings_and_output_layer()
        elif self.pre_process or self.post_process:
            weight: Any = self.shared_embedding_or_output_weight()
            weight.is_embedding_or_output_parameter = weight.shared_embedding = True
            # Its gradient is reduced over both copies; the norm of the whole gradient counts the first one alone.
            weight.shared = self.post_process
            if self.post_process and self._embedding_of_first_stage is not None:
                weight.data.copy_(self._embedding_of_first_stage)

    @property
    def wire(self) -> Wire:
        """What travels between stages: another shape while sequence parallelism is off for decoding."""
        return Wire.of(cast(VPTransformerConfig, self.config))

    def set_input_tensor(self, input_tensor: Sequence[Tensor | None]) -> None:
        """What the stage before has sent: one tensor [S, B, width of the wire]; the first stage gets None."""
        self._received = input_tensor[0]

    @property
    def device(self) -> torch.device:
        """Where its parameters lie, and what it is asked has to lie."""
        return next(self.parameters()).device

    def absolute_name(self, name: str) -> str:
        """A parameter's name with the global number of its layer (from 0), as in checkpoints and one-process runs."""
        offset = self.stage.layers.start - 1
        return re.sub(r"(?<=decoder\.layers\.)\d+", lambda match: str(int(match.group()) + offset), name)

    def standardised(self, tokens_BS: Tensor) -> Tensor:
        """Embeddings [B, S, H], each channel less its mean and over its deviation in the whole table."""
        table_VH = self.embedding.word_embeddings.weight.detach()
        return Scale.of(table_VH).standardised(table_VH[tokens_BS])

    def output_weight(self) -> Tensor:
        """The output projection's matrix, [V, H]; under tensor parallelism this rank's rows.

        Raises:
            ConfigError: a denoiser is asked, which has none.
        """
        if isinstance(self.decoder, Diffuser):
            raise ConfigError(
                "a denoiser has no distribution over tokens",
                source="model.layer_type = denoiser",
                remedy="name a model that writes text; the objective denoising measures this one",
            )
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        return cast("Tensor", weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """The output projection over the whole vocabulary, [..., H] -> [..., V]; equal on every rank."""
        with annotated("head"):
            return gather_from_tensor_model_parallel_region(self.project(hidden), group=self.pg_collection.tp)

    def project(self, hidden: Tensor) -> Tensor:
        """The output projection over this rank's part of the vocabulary, [..., H] -> [..., V / T]."""
        return self.output_layer(hidden, weight=self.output_weight())[0]

    def forward(
        self, tokens_BS: Tensor, layout: SequenceLayout, computed: dict[int, tuple[Tensor, Tensor]] | None = None
    ) -> ModelOutput | Tensor:
        """One pass over packed rows.

        Args:
            tokens_BS: int64.
            layout: documents and positions.
            computed: receives each layer's keys and values, see `VPSelfAttention.forward`, where rows are to be
                continued by `generation`.

        Returns:
            on the last stage what an objective reads, of a denoiser its tokens' standardised embeddings; on others the
            tensor for the next stage.
        """
        if isinstance(self.decoder, Diffuser):
            return ModelOutput(self.standardised(tokens_BS), self)
        if self._received is None:
            embedded_SBH = self.embedding(input_ids=tokens_BS, position_ids=None)
            # Of a single row upstream transposes the strides: as layers have them, or the first is compiled apart.
            hidden_SBH, first_value = embedded_SBH.view(embedded_SBH.shape), None
        else:
            hidden_SBH, first_value = self.wire.unpack(self._received)
            self._received = None
        padding_BS = layout.document_id[:, -tokens_BS.shape[1] :] < 0
        tp, split = self.pg_collection.tp, self.config.sequence_parallel
        if split:
            padding_BS = padding_BS.chunk(tp.size(), dim=1)[tp.rank()]
        real = RealTokens(padding_BS, self.config.moe_router_topk)
        hidden_SBH, first_value = self.decoder(hidden_SBH, layout, computed, real, first_value)
        if not self.post_process:
            return self.wire.pack(hidden_SBH, first_value)
        if split:
            # What follows is the same on every rank, so each takes its part of the gradient as it is.
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, tensor_parallel_output_grad=False, group=tp)
        return ModelOutput(hidden_SBH.transpose(0, 1), self)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron-Core's sharded state, without the linear layers' extra states, which are always empty."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return {name: value for name, value in state.items() if not name.endswith("._extra_state")}
