"""A checkpoint's files held against their hashes by all ranks together: at full size one alone takes minutes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch.distributed as dist

from megatron_vpmoe.files import first_damage
from megatron_vpmoe.runtime import distributed, pulse

_THREADS = 8
T = TypeVar("T")
Files = Mapping[str, Mapping[str, Any]]


class _Job(NamedTuple):
    folder: Path
    files: Files


_is_helped = False


def with_all_ranks(make: Callable[[], T]) -> T:
    """As ``distributed.from_rank_0``; meanwhile the other ranks hash their shares of what ``make`` checks there."""

    def lead() -> T:
        global _is_helped
        _is_helped = distributed.world_size() > 1
        try:
            return make()
        finally:
            if _is_helped:
                _announced(None)
            _is_helped = False

    while distributed.rank() > 0 and (job := _announced(None)) is not None:
        _first_of_all(job)
    return distributed.from_rank_0(lead)


def first_damaged(folder: Path, files: Files) -> str | None:
    """``files.first_damage`` with hashes; below ``with_all_ranks`` by all ranks."""
    if not _is_helped:
        return _damage(folder, files)
    return _first_of_all(_announced(_Job(folder, files)))


def share_of(files: Files, rank: int, ranks: int) -> list[str]:
    """The files that a rank hashes, in order: each next largest goes to who has the fewest bytes."""
    loads, mine = [0] * ranks, set[str]()
    for name in sorted(files, key=lambda name: -files[name]["bytes"]):
        least = loads.index(min(loads))
        loads[least] += files[name]["bytes"]
        if least == rank:
            mine.add(name)
    return [name for name in files if name in mine]


def _first_of_all(job: _Job | None) -> str | None:
    assert job is not None
    mine = share_of(job.files, distributed.rank(), distributed.world_size())
    found = distributed.gathered(_damage(job.folder, {name: job.files[name] for name in mine}))
    return next((each for each in found if each is not None), None)


def _damage(folder: Path, files: Files) -> str | None:
    def of_file(name: str) -> str | None:
        return first_damage(folder, {name: files[name]}, check_hashes=True, tell=lambda _: pulse.beat())

    try:
        with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
            return next((found for found in threads.map(of_file, files) if found is not None), None)
    except (OSError, ValueError) as error:
        return f"a file cannot be read: {error}"


def _announced(job: _Job | None) -> _Job | None:
    """What rank 0 passes, on every rank; a collective."""
    box = [job]
    dist.broadcast_object_list(box, src=0)
    return box[0]
