"""How checkpoints lie on disk: written whole or not at all, checked before they are trusted, removed only if ours.

A run keeps them under ``<run_dir>/checkpoints``: ``iter_0000100/`` holds torch_dist's files, ``run_state.json`` (what
the checkpoint is: iteration, cursor, configuration, provenance), ``position.npz`` where the cursor has arrays, and
``files.json`` (size and sha256 of every file, written last). A directory without a matching ``files.json`` is damaged,
and passed over. Upstream's tracker file, ``latest_checkpointed_iteration.txt``, moves last and is a hint only: resuming
looks at the directories themselves.

``iter_0000100.partial`` is being written and ``.pruned`` being removed; what a kill leaves of either goes with the next
save. What is damaged, or no checkpoint at all, is renamed ``iter_0000100.damaged`` (``.damaged.2``, ...) by the run
that finds it in its way; such, ``.replaced`` and ``.rolled_back`` are the user's to look at and to remove.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.files import first_damage, json_bytes, list_files, read_json, sync, write_atomically
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training.checkpoint_hashes import first_damaged

ASSETS = "assets"
TRACKER = "latest_checkpointed_iteration.txt"
FILES = "files.json"
RUN_STATE = "run_state.json"
ARRAYS = "position.npz"
_TRACKER_BYTES = 32
_NAME = re.compile(r"iter_(\d{7,})")
_SET_ASIDE = re.compile(r"iter_\d{7,}\.damaged(\.\d+)?")
REMOVABLE = re.compile(r"iter_\d{7,}\.(partial|pruned)")
# Every file that a save writes: torch_dist's, ours, and the beginnings of ours.
_WRITTEN = re.compile(
    r"__\d+_\d+\.distcp|\.metadata|common\.pt|(metadata|run_state|files)\.json|position\.npz|assets/.+|\..+\.tmp"
)


@dataclass(frozen=True)
class Found:
    """A complete checkpoint: its directory and what run_state.json says of it."""

    path: Path
    state: dict[str, Any]

    @property
    def iteration(self) -> int:
        return int(self.state["iteration"])


class Damaged(NamedTuple):
    """What bears a checkpoint's name and is not a complete one."""

    path: Path
    reason: str

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def read_checkpoint(path: Path, *, check_hashes: bool = True) -> Found:
    """One checkpoint, its files held against their list.

    Raises:
        CheckpointError: it is not complete, or not as it was written; ``what`` says in which way.
    """
    reason: str | None = "it is not a folder" if os.path.lexists(path) else "there is no such folder"
    state: dict[str, Any] = {}
    try:
        is_folder = path.is_dir()
    except OSError as error:
        is_folder, reason = False, f"it cannot be read: {error.strerror}"
    if is_folder:
        files = read_json(path / FILES, error=CheckpointError, remedy=_REMEDY)
        reason = wrong_list(files)
        reason = reason or _first_damage(path, files, check_hashes=check_hashes)
    if reason is None:
        state = read_json(path / RUN_STATE, error=CheckpointError, remedy=_REMEDY)
        faults = [name for name in ("iteration", "world_size") if type(state.get(name)) is not int]
        if faults:
            reason = f"{RUN_STATE} does not say {' and '.join(faults)}"
        elif (named := _NAME.fullmatch(path.name)) and state["iteration"] != int(named[1]):
            reason = f"{RUN_STATE} is of iteration {state['iteration']}"
    if reason is not None:
        raise CheckpointError(f"unusable checkpoint: {reason}", source=str(path), remedy=_REMEDY)
    return Found(path, state)


def _first_damage(path: Path, files: dict[str, Any], *, check_hashes: bool) -> str | None:
    try:
        reason = first_damage(path, files, check_hashes=False)
    except (OSError, ValueError) as error:
        reason = f"a file cannot be read: {error}"
    return first_damaged(path, files) if reason is None and check_hashes else reason


_REMEDY = "choose another one, or restore its files from a copy"


def wrong_list(files: dict[str, Any]) -> str | None:
    """Why ``files``, read from ``files.json``, is no list of a checkpoint's files; None if it is."""
    for name, entry in files.items():
        sizes = isinstance(entry, dict) and type(entry.get("bytes")) is int and isinstance(entry.get("sha256"), str)
        if not sizes:
            return f"{FILES} says neither size nor sha256 of {name!r}"
        if name.startswith("/") or ".." in name.split("/"):
            return f"{FILES} names {name!r}, which lies elsewhere"
    return None if RUN_STATE in files else f"{FILES} does not list {RUN_STATE}"


def damage(path: Path, *, check_hashes: bool = True) -> str | None:
    """Why ``path`` is not a complete checkpoint; None if it is."""
    try:
        read_checkpoint(path, check_hashes=check_hashes)
    except CheckpointError as error:
        return error.what.removeprefix("unusable checkpoint: ")
    return None


def find_newest(directory: Path, *, check_hashes: bool = True) -> tuple[Found | None, list[Damaged]]:
    """The newest complete checkpoint under ``directory``, and what newer ones were passed over.

    Raises:
        CheckpointError: ``directory`` is there and cannot be read.
    """
    damaged: list[Damaged] = []
    for path in by_age(directory):
        reason = damage(path, check_hashes=check_hashes)
        if reason is None:
            return read_checkpoint(path, check_hashes=False), damaged
        damaged.append(Damaged(path, reason))
    return None, damaged


def tracker_fault(directory: Path, newest: Found | None) -> str | None:
    """What is wrong with upstream's tracker file beside the newest sound checkpoint.

    None also where there is no tracker, or an older checkpoint is named, as after a kill.
    """
    path = directory / TRACKER
    if not os.path.lexists(path):
        return None
    try:
        text = path.read_bytes()[:_TRACKER_BYTES]
    except OSError as error:
        return f"{path}: it cannot be read: {error.strerror}"
    if not re.fullmatch(rb"\d+\s*", text):
        return f"{path}: it names no iteration: {text!r}"
    if int(text) > (newest.iteration if newest else 0):
        return f"{path}: it names iteration {int(text)}, of which there is no sound checkpoint"
    return None


def write_tracker(directory: Path, iteration: int) -> None:
    """Have upstream's tracker file name an iteration; a folder in its place is set aside."""
    if (tracker := directory / TRACKER).is_dir() and not tracker.is_symlink():
        set_aside(tracker)
    write_atomically(tracker, f"{iteration}\n".encode())


def set_aside_before(directory: Path) -> list[Damaged]:
    """The damaged checkpoints that earlier runs have set aside."""
    names = sorted(name for name in names_in(directory) if _SET_ASIDE.fullmatch(name))
    return [Damaged(directory / name, "set aside by an earlier run") for name in names]


def open_checkpoint(path: Path, *, check_hashes: bool = True) -> Found:
    """A checkpoint directory, or the newest complete one under a run or checkpoints directory.

    Where newer ones are damaged, rank 0 says on stderr which one is taken in their place.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    if _NAME.fullmatch(path.name) or (path / FILES).is_file():  # a copy under another name is one too
        return read_checkpoint(path, check_hashes=check_hashes)
    directory = path / "checkpoints" if os.path.lexists(path / "checkpoints") else path
    found, damaged = find_newest(directory, check_hashes=check_hashes)
    aside = set_aside_before(directory)
    if found is None:
        raise CheckpointError(
            "no complete checkpoint" + "".join(f"\n  passed over {line}" for line in (*damaged, *aside)),
            source=str(directory),
            remedy="train first, or name a directory that holds iter_* checkpoints",
        )
    for line in (*damaged, *(line for line in aside if iteration_of(line.path) > found.iteration)):
        if distributed.rank() == 0:
            print(f"warning: passed over {line}; {found.path.name} is used instead", file=sys.stderr, flush=True)
    return found


def begin(final: Path) -> Path:
    """The empty ``iter_NNNNNNN.partial`` beside ``final``, to be filled and sealed; what killed saves left goes."""
    partial = final.with_name(f"{final.name}.partial")
    for name in filter(REMOVABLE.fullmatch, names_in(final.parent)):
        give_up(final.parent / name)
    if os.path.lexists(partial):
        set_aside(partial)
    partial.mkdir(parents=True)
    return partial


def give_up(partial: Path, *, ignore_errors: bool = True) -> None:
    """Remove what a save or a removal has left, as far as it is ours; it may fill the disk."""
    if is_ours(partial):
        shutil.rmtree(partial, ignore_errors)


def seal(partial: Path, final: Path, run_state: dict[str, Any], hashed: Mapping[str, Mapping[str, Any]] = {}) -> None:
    """Make a directory of torch_dist files a checkpoint: state, list of files with hashes, fsync, rename, tracker.

    Args:
        partial: a finished directory beside ``final``; gone afterwards.
        final: ``iter_NNNNNNN``; what has this name already is set aside.
        run_state: JSON-able; holds ``iteration`` and ``world_size``.
        hashed: size and sha256, by name, of files whose writers have taken them already.

    Raises:
        CheckpointError: what a writer has written is not there.
    """
    if (lacking := first_damage(partial, hashed, check_hashes=False)) is not None:
        raise CheckpointError(
            f"what a rank has written is not seen by rank 0: {lacking}",
            source=str(partial),
            remedy="let the run directory lie on a file system that all machines of the run share",
        )
    write_atomically(partial / RUN_STATE, json_bytes(run_state))
    for path in partial.rglob("*"):
        sync(path)
    files = {**list_files(partial, leave_out=hashed), **hashed}
    write_atomically(partial / FILES, json_bytes(dict(sorted(files.items()))))
    if os.path.lexists(final):
        set_aside(final, "replaced" if damage(final, check_hashes=False) is None else "damaged")
    partial.rename(final)
    write_tracker(final.parent, run_state["iteration"])


def set_aside(path: Path, as_what: str = "damaged") -> Path:
    """Rename what may not keep a checkpoint's name, to a name that is free; returns it."""
    for number in itertools.count(1):
        aside = path.with_name(f"{path.name}.{as_what}" + (f".{number}" if number > 1 else ""))
        if not os.path.lexists(aside):
            break
    path.rename(aside)
    sync(path.parent)
    return aside


def by_age(directory: Path) -> list[Path]:
    """What bears a checkpoint's name, the newest first."""
    return sorted((directory / name for name in names_in(directory) if _NAME.fullmatch(name)), key=iteration_of)[::-1]


def iteration_of(path: Path) -> int:
    """The number in a checkpoint's name."""
    return int(path.name.removeprefix("iter_").split(".")[0])


def names_in(directory: Path) -> list[str]:
    """What lies in a run's ``checkpoints``; nothing where there is no such folder."""
    try:
        return os.listdir(directory) if os.path.lexists(directory) else []
    except OSError as error:
        raise CheckpointError(
            f"the checkpoints cannot be read: {error.strerror}",
            source=str(directory),
            remedy="make it a folder that this user may read; a run that starts afresh takes another --run-name",
        ) from error


def is_ours(folder: Path) -> bool:
    """Whether a folder holds nothing but files that a save writes."""
    if folder.is_symlink() or not folder.is_dir():
        return False
    files = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return all(_WRITTEN.fullmatch(path.relative_to(folder).as_posix()) for path in files)
