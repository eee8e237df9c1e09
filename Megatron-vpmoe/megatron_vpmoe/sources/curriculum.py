"""The curriculum of sampled answers: in which mode a prompt is asked, and how many answers it gets."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from megatron_vpmoe.config.schema_rollouts import MODES, CurriculumPart

_GOLDEN, _WORD = 0x9E3779B97F4A7C15, 1 << 64


def part_at(parts: Sequence[CurriculumPart], share: float) -> CurriculumPart:
    """The part in force once ``share`` of the curriculum's tokens has been sampled."""
    return next(part for part in reversed(parts) if part.from_share <= share)


def mode_of(part: CurriculumPart, number: int) -> str:
    """In which mode the prompt of a number in the run's order is asked.

    The multiples of the golden ratio fill the unit interval evenly, so that any stretch of numbers has the shares to
    within a prompt or two, and a number's mode depends on nothing else.
    """
    place = number * _GOLDEN % _WORD / _WORD
    shares = [getattr(part, mode) for mode in MODES]
    return next(mode for mode, end in zip(MODES, accumulate(shares), strict=True) if place * sum(shares) < end)


def modes_of(parts: Sequence[CurriculumPart]) -> list[str]:
    """Those that any part asks in."""
    return [mode for mode in MODES if any(getattr(part, mode) for part in parts)]
