"""A run in the run store: registered at its start, brought up to date with each checkpoint, concluded at its end.

That it was killed stands nowhere: readers see that nobody holds the directory of a run that never concluded. One whose
end could not be written to the store keeps it in its directory, where they find it.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from threading import Thread
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.errors import BusyError, DataError, visible
from megatron_vpmoe.metrics.records import Record, once, to_stderr
from megatron_vpmoe.metrics.run_store import (
    conclude,
    conclusion_of,
    experiment_of,
    identify,
    json_text,
    opened_store,
    put_row,
    store_path,
    written_directory,
)

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_PATIENCE_SECONDS = 30.0
_RESULTS = ("loss/", "valid", "eval/", "throughput/", "rollout/", "accuracy/", "rewards/", "elapsed/")
"""Prefixes of the tags whose last values are results."""


def results_of(values: Mapping[str, float]) -> dict[str, float]:
    """Of a run's last values by tag those that tell how it came out."""
    return {tag: value for tag, value in values.items() if tag.startswith(_RESULTS)}


class RunStoreSink:
    """Keeps a run's row, from a thread of its own: training neither waits for the store nor fails with it.

    Args:
        cfg: the run.
        directory: of the run, which this process owns.
        provenance: from ``collect_provenance``.
        step: steps done before.
        kept: the records of them.
        world_size: processes of the run.
        report: takes the line about a failure.

    Raises:
        NotOursError, DataError: as ``run_store.check_store``; the run has not begun.
    """

    def __init__(
        self,
        cfg: RunConfig,
        directory: Path,
        *,
        provenance: Mapping[str, Any],
        step: int,
        kept: Iterable[Record] = (),
        world_size: int,
        report: Callable[[str], None] = to_stderr,
    ) -> None:
        self._path, self._last_step = store_path(cfg.logging.run_store), cfg.training.train_iters
        self._fail = once(report, "the run store is not up to date, training goes on")
        self._values = {record.tag: record.value for record in kept}
        now = time.time()
        self._of_both = {"status": "running", "error": None, "ended": None, "host": socket.gethostname()}
        self._of_both |= {"pid": os.getpid(), "world_size": world_size}
        self._run = {
            "name": cfg.training.run_name,
            "experiment": experiment_of(cfg.logging.experiment, directory),
            "directory": written_directory(self._path, directory),
            "started": now,
            "config": json_text(cfg.model_dump(mode="json")),
            "config_hash": provenance.get("config_hash"),
            "provenance": json_text(provenance),
        }
        self._segment = {"started": now, "first_step": step}
        self._step = step
        self._id: str | None = None
        self._directory, self._concluded = directory, False
        self._before = (conclusion_of(directory) or {"status": "killed"})["status"]
        conclude(directory, None)
        try:
            self._put(self._rows())
        except BusyError as error:  # the thread tries again
            self._fail(error.what)
        self._queue: SimpleQueue[dict[str, dict[str, Any]] | None] = SimpleQueue()
        self._thread = Thread(target=self._work, name="run store", daemon=True)
        self._thread.start()

    def write(self, records: Sequence[Record]) -> None:
        """Remember the last values."""
        for step, tag, value in records:
            self._values[tag], self._step = value, max(self._step, step)

    def sync(self) -> None:
        """Have the results so far written soon; a checkpoint does not count on them."""
        self._queue.put(self._rows())

    def close(self, failure: str | None = None) -> None:
        """Conclude the run, waiting for the store for some seconds at most."""
        ended = "finished" if self._step >= self._last_step else "stopped"
        told = None if failure is None else visible(failure)  # SQLite takes no half of a surrogate pair
        self._of_both |= {"status": ended if failure is None else "failed", "error": told, "ended": time.time()}
        rows = self._rows()
        self._queue.put(rows)
        self._queue.put(None)
        self._thread.join(_PATIENCE_SECONDS)
        if self._thread.is_alive():
            self._fail(f"{self._path} has not answered within {_PATIENCE_SECONDS:.0f} s")
        if not self._concluded:
            try:
                conclude(self._directory, rows["runs"])
            except (OSError, DataError) as error:
                self._fail(f"{type(error).__name__}: {error}")

    def _rows(self) -> dict[str, dict[str, Any]]:
        results = json_text(results_of(self._values))
        return {
            "runs": {**self._run, **self._of_both, "step": self._step, "results": results},
            "segments": {**self._segment, **self._of_both, "last_step": self._step},
        }

    def _work(self) -> None:
        while (rows := self._queue.get()) is not None:
            try:
                self._put(rows)
                self._concluded = rows["runs"]["status"] != "running"
            except Exception as error:
                self._fail(f"{type(error).__name__}: {error}")

    def _put(self, rows: dict[str, dict[str, Any]]) -> None:
        """Write the rows; the first time that this succeeds the run gets its place among the others."""
        with opened_store(self._path) as connection:
            if self._id is None:
                run = identify(connection, self._path, self._directory)
                before = connection.execute("SELECT started FROM runs WHERE id = ?", (run,)).fetchone()
                self._run |= {"id": run, **({"started": before[0]} if before else {})}
                ended = (self._before, run, "running")
                connection.execute("UPDATE segments SET status = ? WHERE run = ? AND status = ?", ended)
                number = connection.execute("SELECT count(*) FROM segments WHERE run = ?", (run,)).fetchone()[0]
                self._segment |= {"run": run, "number": number}
            of_run = {**rows["runs"], "id": self._run["id"], "started": self._run["started"]}
            put_row(connection, "runs", of_run, "id")
            of_segment = {**rows["segments"], "run": self._segment["run"], "number": self._segment["number"]}
            put_row(connection, "segments", of_segment, "run", "number")
        self._id = self._run["id"]
