"""One owner at a time: a lock file that names the host and process at work, and that a dead owner does not hold.

The lock is the kernel's record lock on the file (``fcntl.lockf``): it ends with the process however that ends, and a
forked child does not hold it on. The file stays; what it says of an owner who did not take leave tells of a crash.

Some shared file systems take locks that other hosts do not see. So an owner touches its file every few seconds, and who
gets the lock of one on another host that did not take leave watches first whether the file is still touched.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vpmoe.errors import BusyError, NotOursError
from megatron_vpmoe.files import json_bytes, naming

_SECONDS_BETWEEN_TOUCHES = 10.0
_SECONDS_WATCHED = 45.0
"""NFS shows the touch of a file at work after 3 s, or after twice as long as the last time that it was unchanged."""
_SECONDS_TO_WRITE = 1.0
_BEGINNING = b'{\n  "host": '
_HELD: set[Path] = set()
"""A process may take its own record lock twice; this says that it has it."""


@contextmanager
def owned(lock: Path, what: str) -> Iterator[dict[str, Any] | None]:
    """Hold ``lock`` for the block; yields the former owner if it ended without taking leave, such as after a kill.

    Args:
        lock: the file; made with its folder.
        what: what is owned, for the message.

    Raises:
        BusyError: another process, or this one elsewhere, holds it; names host, pid and since when. Or the file system
            takes no locks.
        NotOursError: a file of others lies there.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    path = Path(os.path.realpath(lock))
    if path in _HELD:  # opening the file to read it, and closing it, would give our own lock up
        raise _busy(what, lock, _here())
    with lock.open("a+b") as stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise BusyError(
                    f"{what}: the file system takes no locks ({error.strerror})",
                    source=str(lock),
                    remedy="work on a file system with record locks, so that two processes cannot meet here",
                ) from error
            raise _busy(what, lock, _owner(lock)) from None
        stream.seek(0)
        content = stream.read()
        former = _parsed(content)
        if former is None and not _is_torn(content):
            raise NotOursError("this file is no lock of ours", source=str(lock), remedy="move it away")
        if former is not None and former.get("host") != _here()["host"]:
            _check_silent(lock, what, former)
        _HELD.add(path)
        try:
            with naming(lock):
                _write(stream.fileno(), json_bytes({**_here(), "since": time.strftime("%Y-%m-%d %H:%M:%S%z")}))
            with _touched(path):
                yield former
        finally:
            _HELD.discard(path)
            _write(stream.fileno(), b"")


def check_free(lock: Path, what: str) -> None:
    """Look whether ``owned`` would be refused at this moment; takes and writes nothing.

    Raises:
        BusyError: another process holds it.
    """
    if Path(os.path.realpath(lock)) in _HELD:
        raise _busy(what, lock, _here())
    with contextlib.suppress(OSError), lock.open("r+b") as stream:  # what else is wrong, `owned` will say
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                raise _busy(what, lock, _owner(lock)) from None


def holder(lock: Path) -> dict[str, Any] | None:
    """Who holds ``lock`` at this moment; None: nobody. Neither takes nor writes it, so that no owner meets a reader.

    An owner on another host, whose lock this one may not see, counts while its file is touched.

    Returns:
        ``host``, ``pid`` and ``since`` of the owner, as far as the file tells them.
    """
    if Path(os.path.realpath(lock)) in _HELD:
        return _here()
    try:
        with lock.open("rb") as stream:
            asked = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # struct flock of 64-bit Linux
            found = struct.unpack("hhqqi4x", fcntl.fcntl(stream, fcntl.F_GETLK, asked))
            owner, touched = _parsed(stream.read()) or {}, os.fstat(stream.fileno()).st_mtime
    except OSError:
        return None
    is_near = owner.get("host", socket.gethostname()) == socket.gethostname()
    if found[0] == fcntl.F_UNLCK and (is_near or time.time() - touched > _SECONDS_WATCHED):
        return None
    return owner


@contextmanager
def _touched(path: Path) -> Iterator[None]:
    """Touch a file now and then for the block, from a thread."""
    ended = threading.Event()

    def touch() -> None:
        while not ended.wait(_SECONDS_BETWEEN_TOUCHES):
            with contextlib.suppress(OSError):  # a file system that is away for a moment ends no work
                os.utime(path)

    threading.Thread(target=touch, name="owner", daemon=True).start()
    try:
        yield
    finally:
        ended.set()


def _check_silent(lock: Path, what: str, former: dict[str, Any]) -> None:
    """Watch whether an owner on another host, which did not take leave, is still at work.

    Opens nothing: closing a second descriptor of the file would give our own lock up.
    """
    named = f"process {former.get('pid')} on {former.get('host')}"
    print(f"{what}: {named} did not take leave; watching for {_SECONDS_WATCHED:.0f} s", file=sys.stderr, flush=True)
    before, deadline = os.stat(lock).st_mtime_ns, time.monotonic() + _SECONDS_WATCHED
    while time.monotonic() < deadline:
        time.sleep(min(1.0, _SECONDS_WATCHED / 10))
        if os.stat(lock).st_mtime_ns != before:
            raise _busy(what, lock, former)


def _write(descriptor: int, content: bytes) -> None:
    os.ftruncate(descriptor, 0)
    os.write(descriptor, content)
    os.fsync(descriptor)


def _owner(lock: Path) -> dict[str, Any]:
    """What the holder says of itself; it writes that a moment after it has got the lock."""
    deadline = time.monotonic() + _SECONDS_TO_WRITE
    while (owner := _parsed(lock.read_bytes())) is None and time.monotonic() < deadline:
        time.sleep(_SECONDS_TO_WRITE / 50)
    return owner or {}


def _parsed(content: bytes) -> dict[str, Any] | None:
    try:
        owner = json.loads(content)
    except ValueError:
        return None
    return owner if isinstance(owner, dict) else None


def _is_torn(content: bytes) -> bool:
    """Whether it is nothing, or what a kill or a lost disk leaves of an owner's name: its beginning, or zeros."""
    text = content.strip(b"\0")[: len(_BEGINNING)]
    return text == _BEGINNING[: len(text)]


def _here() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _busy(what: str, lock: Path, owner: dict[str, Any]) -> BusyError:
    host, pid = owner.get("host", "an unnamed host"), owner.get("pid", "unknown")
    return BusyError(
        f"{what} is in use: process {pid} on {host} works there since {owner.get('since', 'an unknown time')}",
        source=str(lock),
        remedy=f"wait for it, or end it (on {host}: kill {pid}); the lock of an ended process is no hindrance",
    )
