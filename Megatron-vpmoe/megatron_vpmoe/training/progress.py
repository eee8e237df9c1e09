"""What a person sees of a run: one line a step, in place on a terminal, line by line in a log. Rank 0 only."""

from __future__ import annotations

import atexit
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as Bar

from megatron_vpmoe.optim import describe_arithmetic, render_assignment_table
from megatron_vpmoe.runtime.device import current_device
from megatron_vpmoe.training.suites import SECONDS

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.training.run import Run
    from megatron_vpmoe.training.saving import Saving

_SMOOTHING = 0.2
"""Weight of the newest interval in the running mean of seconds per step."""
_SHOWN = 3
"""Numbers of a suite that has none above the others."""
_PREFERENCES: dict[str, Callable[[float], str]] = {
    "rewards/margin": lambda value: f"margin {value:.3f}",
    "accuracy/relative": lambda value: f"preferred {value:.0%}",
}


class Progress:
    """Reports a run as it goes.

    Args:
        cfg: the run's length and name.
        start: steps done before.
        enabled: False on every rank but the first; nothing is printed then.
        stream: where to print; None is stdout.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        cfg: RunConfig,
        *,
        start: int = 0,
        enabled: bool = True,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._name, self._total = cfg.training.run_name, cfg.training.train_iters
        self._enabled, self._clock = enabled, clock
        self._console = Console(file=stream or sys.stdout, highlight=False, markup=False, soft_wrap=True)
        self._last_step, self._last_time = start, clock()
        self._seconds_per_step: float | None = None
        self._bar: Bar | None = None
        if enabled and self._console.is_terminal:
            columns = (BarColumn(bar_width=20), TextColumn("{task.description}", markup=False))
            self._bar = Bar(*columns, console=self._console)
            self._task = self._bar.add_task("first step", total=self._total, completed=start)

    def opened(self, run: Run) -> None:
        """The run is ready; says where it is and what it continues."""
        start = f"continues {run.restored_from}" if run.restored_from else "starts"
        self.note(f"{self._name}: {start}, step {run.iteration} of {self._total}, files in {run.directory}")
        for line in run.notes:
            self.note(line)
        if self._enabled:
            arithmetic = describe_arithmetic(run.cfg, current_device().type)
            self._console.print(render_assignment_table(run.assignment, arithmetic))
        self._last_time = self._clock()
        if self._bar is not None:
            self._bar.start()
            # Gives the terminal its cursor back also when the run ends in an error.
            atexit.register(self._bar.stop)

    def step(self, step: int, values: dict[str, float]) -> None:
        """Step ``step`` is done, with the metrics ``values`` (by tag)."""
        now = self._clock()
        if step > self._last_step:
            seconds = (now - self._last_time) / (step - self._last_step)
            before = self._seconds_per_step
            self._seconds_per_step = seconds if before is None else before + _SMOOTHING * (seconds - before)
        self._last_step, self._last_time = step, now
        remaining = None if self._seconds_per_step is None else self._seconds_per_step * (self._total - step)
        line = step_line(step, self._total, values, remaining)
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=line)
        else:
            self.note(line)

    def note(self, text: str) -> None:
        """A line that stays."""
        if self._enabled:
            self._console.print(text)

    def evaluated(self, step: int, values: dict[str, float], prefix: str = "valid") -> None:
        """The validation pass at ``step`` gave ``values``; ``prefix`` is "valid" or "valid/<dataset>"."""
        dataset = prefix.removeprefix("valid").replace("/", " of ", 1)
        rewards = ", ".join(f"{tag} {value:.4f}" for tag, value in values.items() if tag.startswith("reward"))
        told = "  ".join(part for part in (losses(values) or rewards, *_formatted(_PREFERENCES, values)) if part)
        self.note(f"step {step}: validation{dataset} {told}")

    def asked(self, step: int, suite: str, values: dict[str, float]) -> None:
        """The suite ``suite`` gave ``values`` at ``step``; those without a slash are shown, else the first."""
        tags = [tag for tag in values if tag != SECONDS]
        shown = [tag for tag in tags if "/" not in tag] or tags[:_SHOWN]
        told = "  ".join(f"{tag} {values[tag]:.4f}" for tag in shown)
        self.note(f"step {step}: {suite} {told}  ({duration(values[SECONDS])})")

    def saved(self, saving: Saving) -> None:
        """A checkpoint stands."""
        waited = f"training waited {saving.waited:.1f} of {saving.seconds:.1f} s"
        self.note(f"step {saving.iteration}: saved {saving.path}  ({waited})")

    def finished(self, step: int, *, stopped: str | None) -> None:
        """The loop has ended after ``step``; ``stopped``: before the end, and why."""
        self.close()
        outcome = f"stopped at step {step} ({stopped}); --resume continues" if stopped else f"done, step {step}"
        self.note(f"{self._name}: {outcome}")

    def close(self) -> None:
        """Give the terminal back."""
        if self._bar is not None:
            self._bar.stop()


def step_line(step: int, total: int, values: dict[str, float], remaining_seconds: float | None) -> str:
    """The line of one step, from whichever of the known tags are there.

    Args:
        values: tag -> value; unknown tags are left out.
        remaining_seconds: None where nothing is known yet.
    """
    parts = [f"step {step:>{len(str(total))}}/{total}", losses(values)]
    formats = {
        **_PREFERENCES,
        "throughput/tokens_per_second": lambda value: f"{_thousands(value)} tok/s",
        "throughput/mfu_pct": lambda value: f"mfu {value:.1f}%",
        "rollout/reward_mean": lambda value: f"reward {value:.4f}",
        "lr": lambda value: f"lr {value:.2e}",
        "grad_norm": lambda value: f"grad {value:.3g}",
        "moe/router_agg/mean_cv_pct": lambda value: f"router cv {value:.0f}%",
    }
    parts += _formatted(formats, values)
    if remaining_seconds is not None:
        parts.append(f"eta {duration(remaining_seconds)}")
    return "  ".join(part for part in parts if part)


def _formatted(formats: dict[str, Callable[[float], str]], values: dict[str, float]) -> list[str]:
    return [render(values[tag]) for tag, render in formats.items() if tag in values]


def losses(values: dict[str, float]) -> str:
    """Such as "loss 2.1 (analysis 1.2, final 0.9)" from the tags under ``loss/``; empty where there is none."""
    parts = [f"{tag.removeprefix('loss/')} {value:.4f}" for tag, value in values.items() if tag.startswith("loss/")]
    total = [part.removeprefix("total ") for part in parts if part.startswith("total ")]
    others = [part for part in parts if not part.startswith("total ")]
    if not parts:
        return ""
    return " ".join(["loss", *total, *([f"({', '.join(others)})"] if others else [])])


def duration(seconds: float) -> str:
    """Such as "45s", "3m20s", "2h05m" or "3d04h"."""
    whole = max(0, round(seconds))
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"


def _thousands(value: float) -> str:
    if value < 1e4:
        return f"{value:.0f}"
    return f"{value / 1e3:.1f}k" if value < 1e6 else f"{value / 1e6:.2f}M"
