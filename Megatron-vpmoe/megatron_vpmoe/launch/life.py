"""What the workers of this machine show of themselves to their launcher: signs of life, and stacks when it asks."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

from megatron_vpmoe.runtime import pulse

_PATIENCE_SECONDS = 2.0  # for stacks; a process writes its own within milliseconds
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*$", re.MULTILINE)
# The innermost frame of who waits for other processes. Within upstream some wait for what is under way already; and who
# has a GPU waits for it to be through with its collectives, where training first asks for a number.
_WAITS = re.compile(
    r"torch/distributed/|megatron/core/(distributed|pipeline_parallel|tensor_parallel)/"
    r"|megatron_vpmoe/runtime/(distributed|exchange|sharded_data_parallel|signals|stages)\.py"
    r"|megatron_vpmoe/training/(resources|router|saving|step)\.py"
)


class Life:
    """Of the workers that write into ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has_begun(self, rank: int) -> bool:
        """Whether a worker shows signs of life, and takes the signal that asks for its stacks."""
        return pulse.shown(self._folder, rank) is not None

    def silence(self, rank: int, since: float) -> float:
        """Seconds without a sign of life since ``time.monotonic()`` was at least ``since``."""
        shown = pulse.shown(self._folder, rank)
        return 0.0 if shown is None else time.monotonic() - max(shown.at, since)

    def is_stalled(self, ranks: Iterable[int], since: float) -> bool:
        """Whether all of them have been silent for longer than they are allowed: one that hangs holds up the others,
        and one that is alive may be what they wait for.
        """
        every = [(rank, pulse.shown(self._folder, rank)) for rank in ranks]
        return bool(every) and all(
            shown is not None and self.silence(rank, since) > shown.allowed for rank, shown in every
        )

    def stacks(self, pids: Mapping[int, int]) -> dict[int, str]:
        """Ask processes for the stacks of their threads, the innermost frame first and the main thread last.

        Args:
            pids: rank -> process id. A stopped process goes on for it.
        """
        asked = {rank: pid for rank, pid in pids.items() if self.has_begun(rank)}
        before = {rank: self._written(rank) for rank in asked}
        for pid in asked.values():
            for signum in (signal.SIGUSR2, signal.SIGCONT):
                send(pid, signum)
        end, told = time.monotonic() + _PATIENCE_SECONDS, dict[int, str]()
        while len(told) < len(asked) and time.monotonic() < end:
            time.sleep(0.1)  # one is written at once, but not as one piece
            for rank in asked.keys() - told.keys():
                if text := self._written(rank)[len(before[rank]) :]:
                    told[rank] = text
        return {rank: self._written(rank)[len(before[rank]) :] for rank in told}

    def crashed(self, ranks: Iterable[int]) -> dict[int, str]:
        """What processes have written as they crashed, of those that did."""
        written = {rank: self._written(rank).split("\n\nExtension modules:")[0] for rank in ranks}
        return {rank: text for rank, text in written.items() if "Fatal Python error" in text}

    def _written(self, rank: int) -> str:
        try:
            return (self._folder / f"{rank}.stacks").read_text(errors="replace")
        except OSError:
            return ""


def waits_for_others(stacks: str) -> bool:
    """Whether a thread of a process waits for other processes, as far as its stack says."""
    innermost = (lines[1] for thread in _threads(stacks) if len(lines := thread.splitlines()) > 1)
    return any(_WAITS.search(line) for line in innermost)


def together(stacks: Mapping[int, str], first: int | None) -> str:
    """Stacks of ranks as a text, the same ones once, those of the rank ``first`` before the others."""
    ranks_of: dict[str, list[int]] = {}
    for rank, text in sorted(stacks.items(), key=lambda each: (each[0] != first, each[0])):
        # The numbers of threads differ from process to process, and the main one is what is looked at first.
        shown = "".join(reversed(_threads(text))) if _THREAD.search(text) else text
        ranks_of.setdefault(_THREAD.sub("thread:", shown).strip("\n"), []).append(rank)
    parts = [f"-- stack of worker {', '.join(map(str, ranks))}:\n{text}" for text, ranks in ranks_of.items()]
    return "\n".join(parts)


def _threads(stacks: str) -> list[str]:
    """The part of each thread."""
    starts = [found.start() for found in _THREAD.finditer(stacks)]
    return [stacks[start:end].rstrip() + "\n" for start, end in zip(starts, [*starts[1:], len(stacks)], strict=True)]


def send(pid: int, signum: signal.Signals) -> None:
    """A signal, to a process that may have ended."""
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return


def catches(pid: int, signum: signal.Signals) -> bool:
    """Whether a process does something of its own at a signal."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has ended
        return False
    found = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return found is not None and bool(int(found[1], 16) >> (signum - 1) & 1)
