"""Records to Weights & Biases, from a thread of their own: training neither waits for it nor fails with it.

Offline by default: W&B then writes under the run's directory, and ``wandb sync`` uploads it later.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from time import monotonic
from typing import Any, Literal

from megatron_vpmoe.metrics.records import Record, once, to_stderr

_QUEUED_STEPS = 1024
_PATIENCE_SECONDS = 30.0


class WandbSink:
    """A W&B run.

    Whatever goes wrong with it is reported once, in one line; training goes on and ``metrics.jsonl`` has everything.

    Args:
        project: W&B's project.
        run_name: display name, and the run's id, so that a resumed run continues the same W&B run.
        mode: "offline" writes locally, "online" uploads.
        directory: W&B puts its files into ``directory/wandb``.
        config: the resolved configuration, shown with the run.
        history: of a resumed run, the records that it goes on from. Offline the new file holds them as well, and the
            files before it, which may hold steps that are done again, are renamed: syncing uploads each step once.
        report: takes the line about a failure.
    """

    def __init__(
        self,
        *,
        project: str,
        run_name: str,
        mode: Literal["offline", "online"],
        directory: Path,
        config: dict[str, Any],
        history: Sequence[Record] = (),
        report: Callable[[str], None] = to_stderr,
    ) -> None:
        self._settings = {
            "project": project,
            "name": run_name,
            "id": run_name,
            "resume": "allow" if mode == "online" else None,
            "mode": mode,
            "dir": str(directory),
            "config": config,
        }
        self._history = history
        self._fail = once(report, "Weights & Biases is out of action, training goes on without it")
        self._dropped = self._exit_code = 0
        self._queue: Queue[Sequence[Record] | None] = Queue(_QUEUED_STEPS)
        # A daemon: a hung upload must not keep the process from ending.
        self._thread = Thread(target=self._run, name="wandb", daemon=True)
        self._thread.start()

    def write(self, records: Sequence[Record]) -> None:
        """Queue the records; they are dropped if W&B has fallen a thousand steps behind or has failed."""
        try:
            self._queue.put_nowait(records)
        except Full:
            self._dropped += 1

    def sync(self) -> None:
        """Nothing counts on W&B's files."""

    def close(self, failure: str | None = None) -> None:
        """Let W&B finish, for half a minute at most."""
        self._exit_code = int(failure is not None)
        end = monotonic() + _PATIENCE_SECONDS
        while self._thread.is_alive() and monotonic() < end:  # a thread that has failed empties no full queue
            with suppress(Full):
                self._queue.put(None, timeout=_PATIENCE_SECONDS / 100)
                break
        self._thread.join(max(0.0, end - monotonic()))
        if self._thread.is_alive():
            self._fail(f"it has not finished within {_PATIENCE_SECONDS:.0f} s")
        if self._dropped:
            self._fail(f"the records of {self._dropped} steps were dropped")

    def _run(self) -> None:
        try:
            import wandb

            offline = self._settings["mode"] == "offline"
            earlier = Path(self._settings["dir"]).glob(f"wandb/offline-run-*-{self._settings['id']}")
            for folder in list(earlier) if offline else ():
                folder.rename(folder.with_name(folder.name.replace("offline", "superseded", 1)))
            run = wandb.init(**self._settings, settings=wandb.Settings(silent=True))
            _log(run, self._history if offline else ())
            self._history = ()
            while (records := self._queue.get()) is not None:
                _log(run, records)
            run.finish(exit_code=self._exit_code)
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")


def _log(run: Any, records: Iterable[Record]) -> None:
    for step, of_step in groupby(records, key=lambda record: record.step):
        run.log({tag: value for _, tag, value in of_step}, step=step)
