"""The anchor: stored conversations beside sampled answers, so that what was learned from them stays learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.data.blend import Blend, Part, as_stored
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.sources.stored import weights_of

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_ROWS_WITHOUT = 1000
"""Rows one after the other without a supervised token, after which none is expected any more."""


class Anchor:
    """Rows of the run's datasets, in their order, as many as keep a share of supervised tokens.

    A row is given where fewer tokens than the share were so far: over a run it is exact to one row.

    Args:
        parts: the training splits, in the order of ``cfg.data.parts``.
        cfg: ``data`` and ``training.opd_anchor_share``.
        annotations: that documents get, all of them 0.
    """

    def __init__(self, parts: Sequence[Part], cfg: RunConfig, annotations: Sequence[Annotation]) -> None:
        data = cfg.data
        self._blend = Blend(
            parts, weights_of(cfg), seq_length=data.seq_length, window=data.packing_window, seed=data.data_seed
        )
        self._share, self._annotations = cfg.training.opd_anchor_share, annotations
        self._beside = self._given = self._consumed = 0

    def beside(self, tokens: int) -> tuple[list[list[Document]], dict[str, float]]:
        """Rows beside so many sampled tokens; metrics ``data/<name>/{samples,epoch}``.

        Raises:
            DataError: no row has a supervised token.
        """
        self._beside += tokens
        rows, without = [], 0
        while self._given * (1 - self._share) < self._share * self._beside:
            row = [self._annotated(document) for document in self._blend.documents(self._consumed)]
            self._consumed += 1
            if supervised := sum(int(np.count_nonzero(document.loss_mask[:-1])) for document in row):
                rows.append(row)
            without = 0 if supervised else without + 1
            if without == _ROWS_WITHOUT:
                raise DataError(
                    f"{without} rows in a row have no supervised token",
                    source=", ".join(str(part.dataset.manifest.path) for part in self._blend.parts),
                    remedy="name a dataset that supervises something, or set training.opd_anchor_share to 0",
                )
            self._given += supervised
        cursors = self._blend.cursors(self._consumed)
        samples = {f"data/{cursor.name}/samples": float(cursor.samples) for cursor in cursors}
        return rows, {**samples, **{f"data/{cursor.name}/epoch": float(cursor.epoch) for cursor in cursors}}

    def _annotated(self, document: Document) -> Document:
        length = len(document.tokens)
        nothing = {one.name: np.zeros(one.shape(length), one.dtype) for one in self._annotations}
        return replace(document, annotations=nothing)

    def kept(self) -> dict[str, Any]:
        """Where it stands, JSON-ready."""
        counts = {"beside": self._beside, "given": self._given, "consumed": self._consumed}
        return {**counts, "cursors": as_stored(self._blend.cursors(self._consumed))}

    def restore(self, kept: Mapping[str, Any], *, source: str, allow_change: bool) -> list[str]:
        """Go on from what ``kept`` gave; returns lines for the log.

        Raises:
            CheckpointError: these are no cursors, or of other weights.
            KeyError, TypeError, ValueError: it is something else.
        """
        self._beside, self._given, self._consumed = (int(kept[name]) for name in ("beside", "given", "consumed"))
        return self._blend.resume(self._consumed, kept["cursors"], source=source, allow_change=allow_change)
