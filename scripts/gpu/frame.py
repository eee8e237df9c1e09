"""A section of the check: what it compares and measures, in how much time, and what becomes of it when it dies."""

from __future__ import annotations

import contextlib
import gc
import math
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from megatron_vpmoe.runtime import device

Numbers = dict[str, Tensor]
"""What a correctness section computes: a tensor by name, on whatever device."""
Say = Callable[[str], object]


class OverBudget(BaseException):
    """The section's time is up. No ``Exception``: a compiler must not take it for a failure of what it compiles."""


class Expected(Protocol):
    """Gives a section's numbers as the CPU computes them."""

    def __call__(self, section: str) -> Numbers: ...


@dataclass
class Findings:
    """What a section found, told as it is found.

    Attributes:
        say: told a line at a time.
        dry: small sizes, on the CPU.
        expected: the CPU's numbers.
        traces: where what is too large for a report goes.
        checks: {"name", "error", "limit", "passed"} each.
        rows: the section's table.
        notes: lines beside it.
        lost: what cases died of.
        absent: what could not be compared, since this machine has it not.
    """

    say: Say
    dry: bool
    expected: Expected
    traces: Path
    checks: list[dict[str, Any]] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    absent: list[str] = field(default_factory=list)

    @contextlib.contextmanager
    def case(self, name: str) -> Iterator[None]:
        """One of several: what it dies of ends it alone, and the section counts as died when the others have run."""
        if self.lost:  # by now nothing holds the frames of what died
            _tidy()
        try:
            yield
        except Exception as error:
            self.lose(error, f"{name}: ")

    def lose(self, error: Exception, name: str = "") -> None:
        """Note what something died of."""
        said = (str(error).splitlines() or [""])[0]
        if isinstance(error, torch.OutOfMemoryError):
            cause = f"out of memory: {said}"
        else:
            frame = traceback.extract_tb(error.__traceback__)[-1]
            cause = f"{type(error).__name__}: {said} ({frame.filename}:{frame.lineno})"
            self.say("".join(traceback.format_exception(error)).rstrip())
        self.lost.append(name + cause)
        self.say(f"died: {self.lost[-1]}")

    def check(self, name: str, error: float, limit: float) -> None:
        """Hold an error to its limit; what is no number does not pass."""
        passed = math.isfinite(error) and error <= limit
        shown = error if math.isfinite(error) else None
        self.checks.append({"name": name, "error": shown, "limit": limit, "passed": passed})
        self.say(f"{'ok    ' if passed else 'FAILED'} {name}: {error:.2e} (limit {limit:g})")

    def compare(self, name: str, got: Mapping[str, Tensor], want: Mapping[str, Tensor], limit: float) -> None:
        """Hold the worst tensor's relative error, |got - want| / |want| by Frobenius norms, to ``limit``."""
        errors = {key: relative_error(got[key], want[key]) for key in want}
        worst = max(errors, key=lambda key: errors[key] if math.isfinite(errors[key]) else math.inf)
        self.check(f"{name}, worst in {worst}", errors[worst], limit)

    def row(self, **cells: Any) -> None:
        """A line of the table."""
        self.rows.append(cells)
        self.say("  ".join(f"{key} {shown(value)}" for key, value in cells.items()))

    def skip(self, name: str, why: str) -> None:
        """Note what this machine does not have; a section that could compare nothing for it is no failure."""
        self.absent.append(name)
        self.note(f"{name}: not here: {why}")

    def note(self, text: str) -> None:
        """A line beside the table."""
        self.notes.append(text)
        self.say(text)


def relative_error(got: Tensor, want: Tensor) -> float:
    """In fp64 on the CPU; of a target that is zero, the norm itself."""
    difference, target = (x.detach().double().cpu() for x in (got, want))
    difference = (difference - target).norm()
    scale = target.norm()
    return float(difference / scale if scale > 0 else difference)


def shown(value: Any) -> str:
    """A cell as people read it: four digits."""
    if isinstance(value, dict):
        return str(value["median"])
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


@dataclass(frozen=True)
class Section:
    """One part of the check.

    Attributes:
        name: for ``--only``.
        title: what it does, a line.
        budget_s: seconds after which it is stopped.
        run: does it.
        numbers: of a section that compares with the CPU: its numbers there; the argument is ``dry``.
        decides: whether the exit code hangs on it.
    """

    name: str
    title: str
    budget_s: int
    run: Callable[[Findings], None]
    numbers: Callable[[bool], Numbers] | None = None
    decides: bool = False


def perform(section: Section, findings: Findings) -> dict[str, Any]:
    """Run a section to its end, its budget or its death; the report's entry of it."""
    begin = time.monotonic()
    try:
        with _alarm(section.budget_s):
            section.run(findings)
            device.finish()
    except OverBudget:
        findings.lost.append(f"stopped: its {section.budget_s} s were over")
        findings.say(f"died: {findings.lost[-1]}")
    except Exception as error:
        findings.lose(error)
    died = "; ".join(findings.lost) or None
    failed = [check["name"] for check in findings.checks if not check["passed"]]
    without = "skipped" if findings.absent else "measured"
    status = "failed" if failed else "died" if died else "passed" if findings.checks else without
    _tidy()
    return {
        "name": section.name,
        "title": section.title,
        "status": status,
        "decides": section.decides,
        "seconds": round(time.monotonic() - begin, 1),
        "budget_s": section.budget_s,
        "died": died,
        "checks": findings.checks,
        "rows": findings.rows,
        "notes": findings.notes,
    }


@contextlib.contextmanager
def _alarm(budget_s: int) -> Iterator[None]:
    """Raise ``OverBudget`` in this thread after so many seconds."""

    def over(*_: object) -> None:
        raise OverBudget

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, budget_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _tidy() -> None:
    """Give back what the section held; after an error of the card itself every call fails, this one too."""
    gc.collect()
    if device.has_gpu():
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
