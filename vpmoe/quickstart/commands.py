"""Run one command as a user would type it, its output going straight to the terminal, signals passed on to it."""

from __future__ import annotations

import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from vpmoe.quickstart.errors import CommandFailed, Interrupted

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


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


def run_command(command: Command, folder: Path) -> None:
    """Run ``command`` in ``folder`` and wait for its end.

    A signal is passed on to the command, which ends in its own way (training finishes the step and saves).

    Raises:
        Interrupted: a signal came meanwhile.
        CommandFailed: any exit code but 0.
    """
    # A session of its own: a terminal's Ctrl-C would otherwise reach it twice, directly and passed on.
    process = subprocess.Popen(command.executable_words(), cwd=folder, start_new_session=True)
    with _passing_on(process) as received:
        code = process.wait()
    if received:
        raise Interrupted(received[0].name, received[0].value)
    if code != 0:
        raise CommandFailed(str(command), 128 - code if code < 0 else code)


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
