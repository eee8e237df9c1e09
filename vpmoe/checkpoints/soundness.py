"""Whether what lies on the disk is what was written: every file of a run, checkpoint, object or export, by its hash."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from megatron_vpmoe.errors import CheckpointError, VpmoeError
from megatron_vpmoe.files import first_damage, read_json
from vpmoe.checkpoints.places import Place, find

_THREADS = 8  # what reads and hashes beside each other before a disk has no more


@dataclass(frozen=True)
class Listed:
    """A folder and what it was written with.

    Attributes:
        folder: of the files.
        files: name -> bytes, sha256; empty where the list itself is damaged.
        fault: what no file's hash tells: of the list, the state, the tracker; None: nothing.
    """

    folder: Path
    files: Mapping[str, Mapping[str, Any]]
    fault: str | None

    @property
    def bytes(self) -> int:
        """Of all files together."""
        return sum(entry.get("bytes", 0) for entry in self.files.values())


def listed(path: Path) -> list[Listed]:
    """Every list of files at a path: of a run one a checkpoint, of an object its receipt's.

    Raises:
        CheckpointError: nothing lies there, or nothing says what its files were.
    """
    place = find(path)
    by_receipt = _of_receipt(place) if place.kind in ("object", "HF directory") else []
    if by_receipt and by_receipt[0].fault is None:
        return by_receipt  # it lists the files of a checkpoint in it too
    lists = by_receipt + [_of_checkpoint(checkpoint) for checkpoint in place.checkpoints]
    if place.kind == "run":
        lists += _of_tracker(place)
    if not lists:
        raise CheckpointError(
            "nothing says what its files were: it has no receipt",
            source=str(path),
            remedy="only what this project has written can be held against its hashes; fetch it again if in doubt",
        )
    return lists


def _of_checkpoint(path: Path) -> Listed:
    from megatron_vpmoe.training.checkpoint_files import FILES, damage, wrong_list

    fault = damage(path, check_hashes=False)
    try:
        files = read_json(path / FILES, error=CheckpointError)
    except CheckpointError as error:
        return Listed(path, {}, error.what)
    if wrong_list(files):
        return Listed(path, {}, fault)
    # What is wrong with files is told of each of them.
    is_told = fault is not None and first_damage(path, files, check_hashes=False) == fault
    return Listed(path, files, None if is_told else fault)


def _of_tracker(place: Place) -> list[Listed]:
    from megatron_vpmoe.training.checkpoint_files import find_newest, set_aside_before, tracker_fault

    directory = place.checkpoints[0].parent
    fault = tracker_fault(directory, find_newest(directory, check_hashes=False)[0])
    aside = [Listed(each.path, {}, each.reason) for each in set_aside_before(directory)]
    return aside + ([] if fault is None else [Listed(directory, {}, fault)])


def _of_receipt(place: Place) -> list[Listed]:
    try:
        receipt = place.receipt
    except VpmoeError as error:
        return [Listed(place.path, {}, error.what)]
    return [] if receipt is None else [Listed(place.path, receipt["files"], None)]


def damages(of: Listed, tell: Callable[[int], None] = lambda _: None, *, check_hashes: bool = True) -> list[str]:
    """Each damage of a folder, in the order of its list; reads only, several files at a time.

    Args:
        of: from ``listed``.
        tell: told the bytes of each piece that was read; by one thread at a time.
        check_hashes: compare contents, not only names and sizes.
    """
    lock = Lock()

    def told(size: int) -> None:
        with lock:
            tell(size)

    def damage(name: str) -> str | None:
        try:
            return first_damage(of.folder, {name: of.files[name]}, check_hashes=check_hashes, tell=told)
        except (OSError, ValueError, KeyError) as error:
            return f"{name} cannot be read: {getattr(error, 'strerror', None) or error}"

    with ThreadPoolExecutor(min(_THREADS, os.cpu_count() or 1)) as threads:
        found = [each for each in threads.map(damage, of.files) if each is not None]
    return found if of.fault is None else [of.fault, *found]
