"""Rollouts that a teacher scores: every answer is learned from, beside an anchor of stored conversations.

The teacher's numbers are annotations of the batches, added by the source around this one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.sources.anchor import Anchor
from megatron_vpmoe.sources.curriculum import mode_of, part_at
from megatron_vpmoe.sources.form import Form, check_validity_can_be_told
from megatron_vpmoe.sources.groups import Rollout
from megatron_vpmoe.sources.prompts import FilePrompts, Prompts, in_order
from megatron_vpmoe.sources.rollouts import Rollouts
from megatron_vpmoe.sources.sampling import Reached, Sampler, Sampling

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


class Taught(Rollouts):
    """See ``Rollouts``.

    Args:
        prompts: to draw from.
        parts: the training splits: their vocabulary is the model's, and the anchor is of them.
        cfg: as ``Rollouts`` and ``Anchor`` read it.
        dp_rank: of this process among those that hold different data.
        dp_size: their number.
    """

    def __init__(self, prompts: Prompts, parts: Sequence[Part], cfg: RunConfig, dp_rank: int, dp_size: int) -> None:
        manifest = parts[0].dataset.manifest
        super().__init__(prompts, manifest, cfg, dp_rank, dp_size)
        check_validity_can_be_told(manifest, cfg)
        self._form = Form.of(manifest)
        self._anchor = Anchor(parts, cfg, self.annotations) if cfg.training.opd_anchor_share else None

    def _sample(self, begin: Reached, by: Sampler) -> Sampling:
        asked = list(in_order(self._prompts, self._cfg.rollout_seed, begin.drawn, self._cfg.rollout_groups))
        size, metrics = self._cfg.rollout_group_size, dict[str, float]()
        if self._cfg.curriculum is not None:
            assert isinstance(self._prompts, FilePrompts) and self._cfg.curriculum_tokens is not None
            share = begin.tokens / self._cfg.curriculum_tokens
            part, metrics["curriculum"] = part_at(self._cfg.curriculum, share), share
            asked = [(number, self._prompts.in_mode(one, mode_of(part, number))) for number, one in asked]
            size = part.rollouts
        answers = self._answering(by, asked, size)
        lengths = [len(one.ids) for one in answers.rollouts]
        modes = [one.mode for _, one in asked for _ in range(size)]
        for mode in sorted({mode for mode in modes if mode is not None}):
            own = [length for length, of in zip(lengths, modes, strict=True) if of == mode]
            metrics |= {f"tokens/{mode}": float(sum(own)), f"length/{mode}": sum(own) / len(own)}
        reached = Reached(begin.drawn + len(asked), begin.tokens + sum(lengths))
        return Sampling.of(answers.rollouts, {**answers.metrics(), **metrics}, reached)

    def _rows_of(self, chosen: Sequence[Rollout]) -> tuple[list[list[Document]], dict[str, float]]:
        rows, metrics = super()._rows_of(chosen)
        if self._anchor is None:
            return rows, metrics
        stored, of_anchor = self._anchor.beside(sum(len(one.ids) for one in chosen if self._is_trained_on(one)))
        return [*rows, *stored], {**metrics, **of_anchor}

    def _document(self, rollout: Rollout) -> Document:
        trained = self._is_trained_on(rollout)
        if self._form is None:
            return rollout.document(trained=trained)
        seen = self._form(rollout.prompt_ids.tolist(), rollout.ids.tolist())
        return rollout.document(trained=trained, span_id=seen.span_id)

    def _kept(self) -> dict[str, Any]:
        return {} if self._anchor is None else {"anchor": self._anchor.kept()}

    def _restore(self, data: dict[str, Any], *, source: str, allow_change: bool) -> list[str]:
        if self._anchor is None or "anchor" not in data:  # begun without one
            return []
        return self._anchor.restore(data["anchor"], source=source, allow_change=allow_change)
