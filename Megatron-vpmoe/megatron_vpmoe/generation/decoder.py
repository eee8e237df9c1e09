"""One token of each row through the weights of the training model, without its modules' way for whole sequences.

At a token a row what a step costs is the number of operations, not their size: so keys and queries are normed and
rotated together, a bias carries mask, distance and sink, and what follows from positions is made for all layers at
once. A test holds every design's logits to those of the model's own forward pass.

Weights copied, all in all: a tensor-product layer's factor projections, and where a CPU decodes in fp32 for long enough
(``packed``) every large weight but the experts' and the embedding, laid out for oneDNN.

Host synchronisations: none. Shapes follow from the number of rows and from ``longest`` rounded up, and tensors made in
a step are its own; CUDA graphs (one for each such shape) would need inputs and cache at fixed addresses, which growing
and moving rows do not give yet.

Shapes: B rows, H hidden, V vocabulary.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.generation.kv_cache import KVCache, Past, of_documents
from megatron_vpmoe.generation.layer import Layer
from megatron_vpmoe.generation.linear import ByOneDNN, Linear, Norm, goes_by_onednn
from megatron_vpmoe.generation.positions import Here, Kind, kind_of
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.attention.self_attention import VPSelfAttention
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.output import ModelOutput
from megatron_vpmoe.runtime import stages

_ROUND = 32
"""Columns of the cache are read in multiples of this: shapes change that much less often."""


class Decoder:
    """The layers of this pipeline stage, for one new token a row.

    Args:
        model: in evaluation mode, with whole sequences; its weights must not change while this lives.
        packed: so many steps will follow that large weights are worth a copy in a faster layout (`linear`).
    """

    def __init__(self, model: VPModel, *, packed: bool = False) -> None:
        self._model = model
        layers = cast(Any, model.decoder.layers)
        self._layers = [Layer(layer, packed=packed) for layer in layers]
        self._attentions: list[VPSelfAttention] = [layer.self_attention for layer in layers]
        self._dtype = self._attentions[0].linear_proj.weight.dtype
        wide = torch.promote_types(self._dtype, torch.float32)
        self._kind_of = [kind_of(attention) for attention in self._attentions]
        self._kinds = {
            kind: Kind([one for one in self._attentions if kind_of(one) == kind], wide) for kind in {*self._kind_of}
        }
        large = any(map(goes_by_onednn, model.parameters()))
        self._linears = ByOneDNN() if large else contextlib.nullcontext()
        if model.stage.is_last:
            self._final_norm = Norm(model.decoder.final_layernorm)
            self._output = Linear(model.output_weight(), packed=packed)

    def cache(self, rows: int) -> KVCache:
        """An empty cache for so many rows."""
        first = self._attentions[0]
        return KVCache(
            {attention.layer_number: attention.window for attention in self._attentions},
            rows=rows,
            groups=first.num_groups,
            head_dim=first.head_dim,
            dtype=self._dtype,
            device=self._model.device,
        )

    def pasts(self, token_1S: Tensor, layout: SequenceLayout, spans: Sequence[slice]) -> list[Past]:
        """Of the documents of a packed row, each in its columns, what ``past`` gives."""
        return of_documents(self.past(token_1S, layout), spans)

    def past(self, token_1S: Tensor, layout: SequenceLayout) -> dict[int, tuple[Tensor, Tensor]]:
        """A whole row through the model's own forward pass: of each layer (global number) its keys and values as they
        are stored, [1, G, S, D].
        """
        computed: dict[int, tuple[Tensor, Tensor]] = {}
        with self._linears:
            forward_of_stage(self._model, token_1S, layout, computed)
        return computed

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
            hidden_BH, first = self._embedded(token_B), None
        else:
            hidden, value = model.wire.unpack(received(model, 1, len(token_B)))
            hidden_BH, first = hidden[0].clone(), None if value is None else value[0]
        for layer, here in zip(self._layers, self._here(position_B, cache, longest), strict=True):
            first = layer.run(hidden_BH, first, here, cache)
        if not model.stage.is_last:
            stages.send_to_next_stage(model.wire.pack(hidden_BH[None], None if first is None else first[None]))
            return None
        logits = self._output(self._final_norm(hidden_BH))
        if model.pg_collection.tp.size() > 1:
            logits = gather_from_tensor_model_parallel_region(logits, group=model.pg_collection.tp)
        return logits.float()

    def _here(self, position_B: Tensor, cache: KVCache, longest: int) -> Iterator[Here]:
        """For each layer, in order."""
        columns = -(-longest // _ROUND) * _ROUND
        width = {kind: cache.width(kind[0]) for kind in self._kinds}
        made = {kind: iter(self._kinds[kind].here(position_B, columns, width[kind])) for kind in self._kinds}
        return (next(made[kind]) for kind in self._kind_of)

    def _embedded(self, token_B: Tensor) -> Tensor:
        """Upstream's module asks the host which tokens another rank has."""
        words = self._model.embedding.word_embeddings
        tp = self._model.pg_collection.tp
        if tp.size() == 1:
            return functional.embedding(token_B, words.weight)
        own_B = token_B - words.vocab_start_index
        inside_B = (own_B >= 0) & (own_B < len(words.weight))
        hidden_BH = functional.embedding(own_B.where(inside_B, 0), words.weight) * inside_B.unsqueeze(1)
        torch.distributed.all_reduce(hidden_BH, group=tp)
        return hidden_BH


def forward_of_stage(
    model: VPModel, token_BS: Tensor, layout: SequenceLayout, computed: dict[int, tuple[Tensor, Tensor]] | None = None
) -> ModelOutput | Tensor:
    """The model's forward pass between the stage before, if any, and the one after, which gets what it returns.

    Args:
        model: this rank's part.
        token_BS: int64.
        layout: of them.
        computed: as in ``VPModel.forward``.
    """
    if not model.stage.is_first:
        model.set_input_tensor([received(model, *reversed(token_BS.shape))])
    output = model(token_BS, layout, computed)
    if isinstance(output, Tensor):
        stages.send_to_next_stage(output)
    return output


def received(model: VPModel, positions: int, rows: int) -> Tensor:
    """What the pipeline stage before sends of so many positions and rows."""
    shape = (positions, rows, model.wire.width)
    tensor = torch.empty(shape, dtype=model.config.pipeline_dtype, device=model.device)
    stages.receive_from_previous_stage(tensor)
    return tensor
