"""Signs of life of a worker, and its stacks for whoever asks.

A worker shows that it lives wherever it asks whether it is to stop: before each micro-batch, token and reward, once a
second while it waits for a checkpoint or a served teacher, as each graph is compiled, and with each tensor of a
checkpoint that is read and each piece of one that is hashed. Whoever watches ends the run when no sign has come for
longer than is allowed: the launcher, which sees those of all its workers in a file of each; or, under plain torchrun, a
thread of the worker itself.

SIGUSR2 has a process write the stack of each of its threads, also where it is stuck in C, and so does a crash.
"""

from __future__ import annotations

import faulthandler
import math
import mmap
import os
import signal
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import NamedTuple, TextIO

_NUMBERS = struct.Struct("dd")
_SECONDS_BETWEEN_LOOKS = 1.0
_SECONDS_OF_GRACE = 10.0
"""What the watching thread may be late by before it is taken for held up, as by C code that keeps Python's lock."""


class Shown(NamedTuple):
    """What a worker shows.

    Attributes:
        at: ``time.monotonic()``, which is one clock for all processes of a machine, of its last sign.
        allowed: seconds from there to the next one; infinite where nobody has to wait for any.
    """

    at: float
    allowed: float


class _Own:
    """Of this process: in memory, until ``begin`` gives it a file or a thread that watches."""

    def __init__(self) -> None:
        self.memory: bytearray | mmap.mmap = bytearray(_NUMBERS.size)
        self.watcher: threading.Thread | None = None
        self.allow(math.inf)

    def beat(self) -> None:
        struct.pack_into("d", self.memory, 0, time.monotonic())

    def allow(self, seconds: float) -> None:
        self.beat()
        struct.pack_into("d", self.memory, 8, seconds)

    def shown(self) -> Shown:
        return Shown(*_NUMBERS.unpack(self.memory[:]))


_own = _Own()


def begin(rank: int, folder: str | None) -> None:
    """From the start of a worker: stacks are told, and signs of life shown, in the launcher's ``folder`` if there is
    one; else on stderr, and this process watches itself. SIGUSR1 asks for nothing until there is something to save.
    """
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    stacks: TextIO = sys.stderr if folder is None else (Path(folder) / f"{rank}.stacks").open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR2, stacks)
    if folder is None:
        _own.watcher = threading.Thread(target=_watch_itself, name="watch", daemon=True)
        return
    path = Path(folder) / f"{rank}.pulse"
    path.with_suffix(".new").write_bytes(_NUMBERS.pack(time.monotonic(), math.inf))
    with path.with_suffix(".new").open("r+b") as stream:
        _own.memory = mmap.mmap(stream.fileno(), _NUMBERS.size)
    path.with_suffix(".new").rename(path)  # from here on it takes SIGUSR1 and SIGUSR2


def shown(folder: Path, rank: int) -> Shown | None:
    """What a worker of this machine shows; None: it has not begun."""
    try:
        return Shown(*_NUMBERS.unpack((folder / f"{rank}.pulse").read_bytes()))
    except (OSError, struct.error):
        return None


def beat() -> None:
    """Show that this process lives; costs less than a microsecond."""
    _own.beat()


@contextmanager
def watched(seconds: float) -> Iterator[None]:
    """Signs of life come every ``seconds``, or this process may be ended; within it a block may say otherwise."""
    before = _own.shown().allowed
    _own.allow(seconds)
    if _own.watcher is not None and not _own.watcher.is_alive():
        _own.watcher.start()
    try:
        yield
    finally:
        _own.allow(before)


def unwatched() -> AbstractContextManager[None]:
    """For work of unknown length that gives no signs."""
    return watched(math.inf)


def _watch_itself() -> None:
    looked = time.monotonic()
    while True:
        shown, now = _own.shown(), time.monotonic()
        silent = now - shown.at
        if math.isinf(shown.allowed):
            faulthandler.cancel_dump_traceback_later()
        elif now - looked > _SECONDS_OF_GRACE:  # the whole process was held, as by Ctrl-Z: not its fault
            _own.beat()
        else:
            if silent > shown.allowed:
                rank = os.environ.get("RANK", "0")
                print(f"worker {rank}: no sign of life for {silent:.0f} s; its stacks:", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.stderr)
                os._exit(1)
            # Where C code keeps Python's lock this thread cannot run; the one that this starts needs no lock.
            faulthandler.dump_traceback_later(shown.allowed - silent + _SECONDS_OF_GRACE, exit=True)
        looked = time.monotonic()
        time.sleep(_SECONDS_BETWEEN_LOOKS)


def compilations_are_signs() -> None:
    """Each graph that torch.compile begins or ends is a sign of life: the first step has dozens and takes minutes."""
    from torch._dynamo.callback import callback_handler

    if _compiles not in callback_handler.start_callbacks:
        callback_handler.register_start_callback(_compiles)
        callback_handler.register_end_callback(_compiles)


def _compiles(_arguments: object) -> None:
    _own.beat()
