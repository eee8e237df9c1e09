"""The record, the interface of a sink, and the stream that feeds sinks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from megatron_vpmoe.metrics.expert_loads import ExpertLoadFile


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
        loads: where those of experts are recorded; likewise.
    """

    def __init__(self, sinks: Sequence[Sink], loads: Sequence[ExpertLoadFile] = ()) -> None:
        self._sinks, self._loads = list(sinks), list(loads)

    def log(self, step: int, values: Mapping[str, float | Tensor]) -> None:
        """Record ``values`` (tag -> number or 0-d tensor) at ``step``."""
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

    def close(self) -> None:
        """Close every sink."""
        for each in (*self._sinks, *self._loads):
            each.close()
