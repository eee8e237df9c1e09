"""The record, the interface of a sink, and the stream that feeds sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

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

    def close(self) -> None:
        """Finish; nothing is written afterwards."""
        ...


class MetricStream:
    """Sends the metrics of a step to every sink.

    Args:
        sinks: may be empty, as on every rank but the first.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Record ``values`` (tag -> number or 0-d tensor) at ``step``."""
        records = [Record(step, tag, float(value)) for tag, value in values.items()]
        for sink in self._sinks:
            sink.write(records)

    def sync(self) -> None:
        """Before a checkpoint is sealed: a run that goes on from it finds every record up to there."""
        for sink in self._sinks:
            sink.sync()

    def close(self) -> None:
        """Close every sink."""
        for sink in self._sinks:
            sink.close()
