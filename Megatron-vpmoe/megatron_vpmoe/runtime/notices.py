"""What asks a run to save and end, besides a signal: a file that appears, a budget of time that runs out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.runtime import distributed


class Notice(Protocol):
    """Looked for about once a second, on every rank; one that sees it is enough.

    Attributes:
        text: what to tell a person.
    """

    @property
    def text(self) -> str: ...

    def refuse_early(self) -> None:
        """Before a run begins that would end at once.

        Raises:
            ConfigError: it stands already.
        """
        ...

    def stands(self) -> bool:
        """Whether it is time to save and end."""
        ...


class PreemptionFile:
    """A file that appears before a machine is taken away; the first process of each node looks for it."""

    def __init__(self, path: Path) -> None:
        self._path, self._looks = path, int(os.environ.get("LOCAL_RANK", "0")) == 0
        self.text = f"the preemption notice {path} is there"

    def stands(self) -> bool:
        """See ``Notice``."""
        return self._looks and os.path.lexists(self._path)

    def refuse_early(self) -> None:
        """Before a run begins, which would end with its first step.

        Raises:
            ConfigError: the file is there.
        """
        if os.path.lexists(self._path):
            raise ConfigError(
                f"{self.text} before the run begins",
                source="failure.preemption_file",
                remedy="remove it where it is of an earlier preemption; else run on another machine",
            )


class TimeBudget:
    """So many minutes since the job began, of which the last are for one checkpoint; rank 0's clock decides.

    Args:
        minutes: all of them.
        seconds_of_save: until a checkpoint that is begun now would stand.
    """

    def __init__(self, minutes: float, seconds_of_save: Callable[[], float]) -> None:
        self._end, self._seconds_of_save = began() + 60 * minutes, seconds_of_save
        self._looked, self._pause = time.monotonic(), 0.0
        self.text = f"the budget of {minutes:g} minutes leaves time for no more than a checkpoint"

    def refuse_early(self) -> None:
        """Before a run begins, which would end before its first step, and again each time that it is started.

        Raises:
            ConfigError: what is left of the budget is no more than a checkpoint may take.
        """
        needed, left = 1.5 * self._seconds_of_save(), self._end - time.time()
        if left <= needed:
            raise ConfigError(
                f"{self.text}: {left:.0f} s are left, and {needed:.0f} s are kept for it",
                source="failure.time_budget_minutes",
                remedy="give more minutes, or null to go on until all is done",
            )

    def stands(self) -> bool:
        """See ``Notice``; between two questions lies at most about what lay between those before."""
        now = time.monotonic()
        self._pause, self._looked = max(now - self._looked, 0.9 * self._pause), now
        left = self._end - time.time()
        return distributed.rank() == 0 and left < 1.5 * self._seconds_of_save() + self._pause


def began() -> float:
    """Seconds since the epoch at which this job did: its launcher, or torchrun, or this process alone."""
    started_by = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    return psutil.Process(started_by).create_time()
