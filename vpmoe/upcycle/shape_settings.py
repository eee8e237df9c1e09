"""Settings of rung 3, and how much text they ask for."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from vpmoe.errors import UpcycleError
from vpmoe.upcycle.job import Task
from vpmoe.upcycle.passages import Passages, TextSettings, calibration_passages

_ROWS_PER_FEATURE = 4
"""Calibration tokens for each unknown that the closed form gives an output channel, at the least."""


class ShapeSettings(TextSettings):
    """Settings of ``shape``."""

    attention: Literal["calibrated", "meanpool"] = "calibrated"
    """"meanpool", the baseline: means over heads and groups."""
    feed_forward: Literal["calibrated", "l2_topk"] = "calibrated"
    """"l2_topk", the baseline: the neurons with the largest columns of the second matrix."""

    ridge: float = Field(default=1e-3, ge=0)
    """Penalty of the closed-form fits, in units of a feature's mean variance."""
    steps: int = Field(default=800, ge=0)
    """Of Adam on a block's regression; 0: only the closed form."""
    learning_rate: float = Field(default=0.06, gt=0)
    """Of these steps, in units of a matrix's root mean square."""

    @property
    def calibrated(self) -> frozenset[str]:
        """The parts of a layer that are: of "attention" and "feed_forward"."""
        return frozenset(part for part in ("attention", "feed_forward") if getattr(self, part) == "calibrated")


def enough_passages(task: Task[ShapeSettings]) -> Passages:
    """What to calibrate on.

    Raises:
        UpcycleError: too few tokens for what is to be fitted.
    """
    found, model = calibration_passages(task), task.cfg.model
    needed = _ROWS_PER_FEATURE * (1 + max(model.ffn_hidden_size, model.num_attention_heads * model.kv_channels))
    if found.num_tokens < needed:
        raise UpcycleError(
            f"{found.num_tokens} calibration tokens; {needed} are needed to fit a layer of {model.ffn_hidden_size} "
            f"neurons and {model.num_attention_heads} heads of {model.kv_channels}",
            source=f"{task.spec.id}: {task.settings.calibration or 'calibration_texts'}",
            remedy="name a larger dataset or more texts, or raise calibration_tokens and text_tokens",
        )
    return found
