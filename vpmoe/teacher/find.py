"""The teacher that a command line names."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vpmoe.errors import DataError
from vpmoe.teacher.interface import Teacher
from vpmoe.teacher.parallel import Parallel


def find_teacher(
    where: str,
    by: Literal["megatron", "hf", "server"] | None,
    *,
    bf16: bool | None,
    tokens: int,
    device: str | None,
    memory_gb: float | None,
    model: str | None,
    tokenizer: Path | None,
    concurrency: int,
    workers: int,
) -> Teacher:
    """See the teachers themselves for the settings; one that the named kind does not read is refused.

    Args:
        where: a path, or the address of a server.
        by: the kind; None: a server for an address, else a model of ours.

    Raises:
        VpmoeError: there is no such teacher.
    """
    by = by or ("server" if where.startswith(("http://", "https://")) else "megatron")
    of_others = {
        "--device": None if by == "hf" else device,
        "--memory-gb": None if by == "hf" else memory_gb,
        "--bf16": bf16 if by == "server" else None,
        "--served-model": None if by == "server" else model,
        "--teacher-tokenizer": None if by == "server" else tokenizer,
    }
    if idle := [name for name, value in of_others.items() if value is not None]:
        raise DataError(f"{by} does not read {', '.join(idle)}", source=where, remedy="leave it out, or set --by")
    if by == "megatron":
        from vpmoe.teacher.megatron import MegatronTeacher

        return Parallel(MegatronTeacher(Path(where), bf16=bf16, tokens=tokens), workers)
    if by == "hf":
        from vpmoe.teacher.hf import HFTeacher

        found = HFTeacher(Path(where), bf16=bf16, device=device, memory_gb=memory_gb, tokens=tokens)
        return Parallel(found, workers)
    from vpmoe.teacher.server import ServerTeacher, Settings
    from vpmoe.tokenizer.hf_directory import HFDirectory

    vocabulary = None if tokenizer is None else HFDirectory(tokenizer)
    return ServerTeacher(Settings(where, model=model, concurrency=concurrency), vocabulary)
