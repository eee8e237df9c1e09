"""How a worker's end is told: to its launcher, which names the first cause of all; without one, on stderr."""

from __future__ import annotations

import atexit
import json
import os
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from megatron_vpmoe.errors import VpmoeError, of_the_system

FOLDER = "VPMOE_ENDINGS"
LAUNCHER = "VPMOE_LAUNCHER"
"""Environment variables of a worker: the launcher's folder for their ends, and the launcher's process id."""


@dataclass(frozen=True)
class Ending:
    """The end of one worker.

    Attributes:
        kind: "done"; "error", of its own; "lost": another process that it waited for has gone or answers no more.
        text: what to tell a person.
        code: the exit code.
        at: seconds since the epoch.
        stack: of one that was lost: where it waited, the innermost frame first.
    """

    kind: str
    text: str
    code: int
    at: float
    stack: str = ""


def ending_of(error: BaseException | None, *, debug: bool = False) -> Ending:
    """What ``error``, or none, makes of a worker; ``debug``: with the traceback of a user's error."""
    if error is None:
        return Ending("done", "", 0, time.time())
    if isinstance(error, SystemExit):
        where = "".join(traceback.format_exception(error)).rstrip()  # perhaps of a thread
        text = f"it left with exit code {error.code} before the run was done\n{where}"
        return Ending("error", text, 1, time.time())
    if is_lost_peer(error):
        frames = reversed(traceback.extract_tb(error.__traceback__))
        stack = "\n".join(f'  File "{frame.filename}", line {frame.lineno} in {frame.name}' for frame in frames)
        return Ending("lost", str(error).split("] ", 1)[-1].split(". ")[0].strip(), 1, time.time(), stack)
    shown = of_the_system(error) if isinstance(error, OSError) else error
    if isinstance(shown, VpmoeError) and not debug:
        return Ending("error", f"{type(shown).__name__}: {shown}", shown.exit_code, time.time())
    code = shown.exit_code if isinstance(shown, VpmoeError) else 1
    return Ending("error", "".join(traceback.format_exception(error)).rstrip(), code, time.time())


def is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed for the sake of another process."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and "gloo/transport" in str(error))


def tell(ending: Ending, environment: Mapping[str, str] = os.environ) -> int:
    """Tell how this worker ended; returns its exit code."""
    folder = environment.get(FOLDER)
    if folder is None and ending.text:
        print(ending.text, file=sys.stderr, flush=True)
    elif folder is not None:
        path = Path(folder) / f"{environment['RANK']}.json"
        path.with_suffix(".tmp").write_text(json.dumps(asdict(ending)))
        path.with_suffix(".tmp").rename(path)
    return ending.code


def told(folder: Path) -> dict[int, Ending]:
    """The ends that workers have told, by rank."""
    return {int(path.stem): Ending(**json.loads(path.read_text())) for path in sorted(folder.glob("*.json"))}


def leave(code: int) -> NoReturn:
    """End this process; after a failure without the teardown of libraries, whose threads may wait for lost peers."""
    if code == 0:
        sys.exit(0)
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
