"""The record, the interface of a sink, and the stream that feeds sinks."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import TYPE_CHECKING, NamedTuple, Protocol

from megatron_vpmoe.metrics.expert_loads import ExpertLoadFile

if TYPE_CHECKING:
    from torch import Tensor


class Record(NamedTuple):
    """One measured value.

    Attributes:
        step: optimizer steps done when it was measured.
        tag: stable name, words separated by slashes.
        value: NaN and infinities are values too.
    """

    step: int
    tag: str
    value: float


class Sink(Protocol):
    """Where records go."""

    def write(self, records: Sequence[Record]) -> None:
        """Take the records of one step."""
        ...

    def sync(self) -> None:
        """Have on disk what a checkpoint counts on."""
        ...

    def close(self, failure: str | None = None) -> None:
        """Finish; nothing is written afterwards. ``failure``: what ended the run before its time."""
        ...


class MetricStream:
    """Sends the metrics of a step to every sink; in a ``with`` block it is closed with what ended the block.

    Args:
        sinks: may be empty, as on every rank but the first; what is added to the list before the first values counts.
        loads: where those of experts are recorded; likewise.
        place: where the run stands now; recorded before the first values of each step.
    """

    def __init__(
        self,
        sinks: Sequence[Sink],
        loads: Sequence[ExpertLoadFile] = (),
        place: Callable[[], Mapping[str, float]] = dict,
    ) -> None:
        self._sinks, self._loads, self._place = sinks, loads, place
        self._placed: int | None = None

    def __enter__(self) -> MetricStream:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _trace: TracebackType | None
    ) -> None:
        self.close(None if error is None else f"{type(error).__name__}: {error}")

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Record ``values`` (tag -> number or 0-d tensor) at ``step``."""
        if step != self._placed:
            values, self._placed = {**self._place(), **values}, step
        records = [Record(step, tag, float(value)) for tag, value in values.items()]
        for sink in self._sinks:
            sink.write(records)

    def log_loads(self, step: int, load_LE: Tensor | None) -> None:
        """Record how many tokens each expert got at ``step``; on the host."""
        if load_LE is not None:
            for file in self._loads:
                file.write(step, load_LE)

    def sync(self) -> None:
        """Before a checkpoint is sealed: a run that goes on from it finds every record up to there."""
        for each in (*self._sinks, *self._loads):
            each.sync()

    def close(self, failure: str | None = None) -> None:
        """Close every sink, also where one of them fails at it."""
        with ExitStack() as closing:
            for file in self._loads:
                closing.callback(file.close)
            for sink in reversed(self._sinks):
                closing.callback(sink.close, failure)


def to_stderr(message: str) -> None:
    """A line on stderr, at once."""
    print(message, file=sys.stderr, flush=True)


def once(report: Callable[[str], None], what: str) -> Callable[[str], None]:
    """Takes reasons and reports the first, in one line after ``what``: a sink that fails tells it once."""
    told = False

    def tell(reason: str) -> None:
        nonlocal told
        if not told:
            told = True
            report(f"{what}: {reason.splitlines()[0] if reason else 'unknown'}")

    return tell
