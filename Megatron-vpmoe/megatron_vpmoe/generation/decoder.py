"""One token of each row through the weights of the training model, without its modules' way for whole sequences.

At a token a row what a step costs is the number of operations, not their size: so keys and queries are normed and
rotated together, a bias carries mask, distance and sink, and masks and angles are made once a step. No weight is
copied. A test holds every design's logits to those of the model's own forward pass.

Host synchronisations: none. Shapes follow from the number of rows and from ``longest`` rounded up.

Shapes: B rows, H hidden, V vocabulary.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor

from megatron_vpmoe.generation.kv_cache import KVCache
from megatron_vpmoe.generation.layer import Layer, Norm, Step, linear
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.norm import RMSNorm
from megatron_vpmoe.runtime import stages

_ROUND = 32
"""Columns of the cache are read in multiples of this: shapes change that much less often."""


class Decoder:
    """The layers of this pipeline stage, for one new token a row.

    Args:
        model: in evaluation mode, with whole sequences; its weights must not change while this lives.
    """

    def __init__(self, model: VPModel) -> None:
        self._model = model
        self._layers = [Layer(layer) for layer in cast(Any, model.decoder.layers)]
        final = model.decoder.final_layernorm
        self._final_norm = None if final is None else Norm(cast(RMSNorm, final))

    def cache(self, rows: int) -> KVCache:
        """An empty cache for so many rows."""
        first = self._layers[0].attention
        dtype = first.linear_proj.weight.dtype
        return KVCache(
            {layer.attention.layer_number: layer.attention.window for layer in self._layers},
            rows=rows,
            groups=first.num_groups,
            head_dim=first.head_dim,
            dtype=dtype,
            device=self._model.device,
        )

    def step(self, token_B: Tensor, position_B: Tensor, cache: KVCache, longest: int) -> Tensor | None:
        """Append one token to rows 0 to B - 1 and predict the next.

        Args:
            token_B: int64.
            position_B: int64, where the token stands in its row.
            cache: with the rows' earlier positions and room for this one; receives it.
            longest: at least the largest position plus one.

        Returns:
            fp32 logits [B, V]; None on pipeline stages before the last, which pass on what they have computed.
        """
        model = self._model
        if model.stage.is_first:
            hidden_BH, first = model.embedding(input_ids=token_B.unsqueeze(1), position_ids=None)[0], None
        else:
            hidden, value = model.wire.unpack(received(model, 1, len(token_B)))
            hidden_BH, first = hidden[0], None if value is None else value[0]
        step = Step(position_B, -(-longest // _ROUND) * _ROUND)
        hidden_BH = hidden_BH.clone()
        for layer in self._layers:
            first = layer.run(hidden_BH, first, step, cache)
        if not model.stage.is_last:
            stages.send_to_next_stage(model.wire.pack(hidden_BH[None], None if first is None else first[None]))
            return None
        assert self._final_norm is not None
        logits = linear(self._final_norm(hidden_BH), model.output_weight())
        return gather_from_tensor_model_parallel_region(logits, group=model.pg_collection.tp).float()


def received(model: VPModel, positions: int, rows: int) -> Tensor:
    """What the pipeline stage before sends of so many positions and rows."""
    shape = (positions, rows, model.wire.width)
    tensor = torch.empty(shape, dtype=model.config.pipeline_dtype, device=model.device)
    stages.receive_from_previous_stage(tensor)
    return tensor
