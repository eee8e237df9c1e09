"""Run one command as a user would type it: output straight to the terminal, signals passed on, gone when we are."""

from __future__ import annotations

import ctypes
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vpmoe.errors import VpmoeError

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None)  # looked up before any fork


class CommandFailed(VpmoeError):
    """A command ended with an error that it has explained itself.

    Args:
        command: as a user would type it.
        exit_code: the command's own, which becomes ours.
    """

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(
            f"the command ended with exit code {exit_code}: {command}",
            remedy="its message is above; after mending it, give the same command again: it goes on from here",
        )
        self.exit_code = exit_code


class Interrupted(VpmoeError):
    """A signal ended a command; what was done is kept.

    Args:
        signal_name: such as SIGINT.
        number: of the signal; the exit code is 128 more, as shells have it.
    """

    def __init__(self, signal_name: str, number: int) -> None:
        super().__init__(f"stopped by {signal_name}; run the same command again to go on from here")
        self.exit_code = 128 + number


@dataclass(frozen=True)
class Command:
    """One command line.

    Attributes:
        words: the command as typed; a leading ``python`` is this interpreter, a leading ``vpmoe`` this package.
    """

    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)

    def executable_words(self) -> list[str]:
        """The words with the interpreter that runs now."""
        first, *rest = self.words
        if first == "python":
            return [sys.executable, *rest]
        if first == "vpmoe":
            return [sys.executable, "-m", "vpmoe.cli", *rest]
        return [first, *rest]


def run_command(command: Command, folder: Path, *, to_stderr: bool = False) -> None:
    """Run ``command`` in ``folder`` and wait for its end.

    A signal is passed on to the command, which ends in its own way (training finishes the step and saves). A kill -9
    of this process ends the command too (on Linux): the next attempt must not meet it at work.

    Args:
        command: the words.
        folder: where it runs.
        to_stderr: what it prints is progress; stdout is left to what we print.

    Raises:
        Interrupted: a signal came meanwhile.
        CommandFailed: any exit code but 0.
    """
    # A session of its own: a terminal's Ctrl-C would otherwise reach it twice, directly and passed on.
    process = subprocess.Popen(
        command.executable_words(),
        cwd=folder,
        stdout=2 if to_stderr else None,
        start_new_session=True,
        preexec_fn=_end_with_parent,
    )
    with _passing_on(process) as received:
        code = process.wait()
    if received:
        raise Interrupted(received[0].name, received[0].value)
    if code != 0:
        raise CommandFailed(str(command), 128 - code if code < 0 else code)


def _end_with_parent() -> None:
    if sys.platform == "linux":
        _LIBC.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


@contextmanager
def _passing_on(process: subprocess.Popen[bytes]) -> Iterator[Sequence[signal.Signals]]:
    """Pass signals on to ``process``; yields the list of those that came."""
    received: list[signal.Signals] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        process.send_signal(number)

    former = {number: signal.signal(number, pass_on) for number in _PASSED_ON}
    try:
        yield received
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
