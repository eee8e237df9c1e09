"""The engine's steps without keys and values: each new token is a forward pass over the whole text before it.

It is what a cache saves, to be measured against, and another way to the same tokens: the model's own forward pass, of
which ``decoder`` is a rewriting. Of a text of n tokens a step costs n tokens' work, and attention n² in memory.

Shapes: R rows, B rows in use, C columns, S positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.generation.decoder import forward_of_stage
from megatron_vpmoe.generation.kv_cache import BLOCK, Past, of_documents
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.output import ModelOutput


class TextRows:
    """As `KVCache`, of tokens alone: int64 ``ids`` [R, C]."""

    def __init__(self, rows: int, device: torch.device) -> None:
        self.ids = torch.zeros(rows, BLOCK, dtype=torch.int64, device=device)

    def reserve(self, positions: int) -> None:
        """Make room for positions 0 to ``positions - 1`` of every row."""
        if positions > self.ids.shape[1]:
            grown = self.ids.new_zeros(len(self.ids), -(-positions // BLOCK) * BLOCK)
            grown[:, : self.ids.shape[1]] = self.ids
            self.ids = grown

    def fill(self, row: int, past: Past) -> None:
        """Begin a row with the tokens of its first positions."""
        ids_S = past[0][0].flatten()
        self.reserve(len(ids_S))
        self.ids[row, : len(ids_S)] = ids_S

    def move(self, source: int, target: int) -> None:
        """Let row ``target`` go on as row ``source`` has come so far."""
        self.ids[target] = self.ids[source]


class WholeTexts:
    """As `Decoder`, with nothing kept from step to step.

    Args:
        model: in evaluation mode, with whole sequences.
        routing: what would tell the experts of a pass; None.

    Raises:
        DataError: experts are spread over ranks, which then would have to agree on a length; or routing is asked for.
    """

    def __init__(self, model: VPModel, routing: object = None) -> None:
        if model.pg_collection.ep.size() > 1 or routing is not None:
            what = "experts spread over ranks" if routing is None else "recorded routing"
            raise DataError(f"{what}, and no cache", source="cached=False", remedy="generate with the cache")
        self._model = model

    def cache(self, rows: int) -> TextRows:
        """Room for so many texts."""
        return TextRows(rows, self._model.device)

    def pasts(self, token_1S: Tensor, _layout: SequenceLayout, spans: Sequence[slice]) -> list[Past]:
        """The tokens themselves, [1, S, 1], in the place of a layer's keys and values; nothing is computed."""
        kept = token_1S[:, None, :, None]
        return of_documents({0: (kept, kept)}, spans)

    def step(self, token_B: Tensor, position_B: Tensor, cache: TextRows, longest: int) -> Tensor | None:
        """Append one token to rows 0 to B - 1 and predict the next, from each row's whole text.

        Returns:
            fp32 logits [B, V]; None on pipeline stages before the last.
        """
        row_B = torch.arange(len(token_B), device=token_B.device)
        cache.ids[row_B, position_B] = token_B
        column_S = torch.arange(longest, device=token_B.device)
        padding_BS = column_S > position_B[:, None]
        document_BS = padding_BS.to(torch.int32).neg()
        layout = SequenceLayout(document_BS, column_S.expand(len(token_B), -1))
        output = forward_of_stage(self._model, cache.ids[: len(token_B), :longest].masked_fill(padding_BS, 0), layout)
        if not isinstance(output, ModelOutput):
            return None
        return self._model.logits(output.hidden_BSH[row_B, position_B]).float()
