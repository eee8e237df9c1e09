"""The directory of a run: whose it is, and what a run may go on from there. Everything here is rank 0's."""

from __future__ import annotations

import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.errors import CheckpointError, NotOursError
from megatron_vpmoe.metrics.expert_loads import FILE_NAME
from megatron_vpmoe.metrics.jsonl import METRICS
from megatron_vpmoe.metrics.run_store import IDENTITY, LOCK
from megatron_vpmoe.ownership import owned
from megatron_vpmoe.training.checkpoint_files import (
    RUN_STATE,
    TRACKER,
    Damaged,
    Found,
    find_newest,
    names_in,
    set_aside,
    set_aside_before,
    tracker_fault,
    write_tracker,
)
from megatron_vpmoe.training.provenance import check_provenance

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_SIGNS = (LOCK, "checkpoints", METRICS)
_LOGS = (METRICS, "samples.jsonl", FILE_NAME)
_WRITTEN = "|".join(re.escape(name) for name in ("config.yaml", "assignment.json", IDENTITY, TRACKER, *_LOGS))
# What ``write_atomically`` has not finished of a run's own files.
_BEGINNING = re.compile(rf"\.({_WRITTEN}|(nonfinite|spike)_\d+_rank\d+(_\d+)?\.json)\.\d+\.tmp")


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_config(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(section, dict) for section in value.values())


_RESUMED = {
    "consumed_samples": _is_count,
    "skipped_steps": _is_count,
    "config": _is_config,
    "provenance": lambda value: isinstance(value, dict),
}


def ownership(directory: Path) -> AbstractContextManager[dict[str, Any] | None]:
    """Hold a run's directory, as :func:`megatron_vpmoe.ownership.owned` does, before anything is written there.

    Raises:
        BusyError: on entering; another process trains there.
        NotOursError: a ``config.yaml`` lies there that no run wrote.
    """
    if (directory / "config.yaml").exists() and not any((directory / name).exists() for name in _SIGNS):
        raise NotOursError(
            "here lies a config.yaml and no run: training would overwrite it",
            source=str(directory),
            remedy="--run-dir or --run-name with a directory of the run's own",
        )
    return owned(directory / LOCK, f"the run directory {directory}")


def restorable(cfg: RunConfig, *, check_hashes: bool = True) -> tuple[Found | None, list[Damaged], list[str]]:
    """The checkpoint that ``cfg`` would continue from, checked as far as needs no weights; reads only.

    Args:
        check_hashes: compare the contents of its files too, not only names and sizes.

    Returns:
        the checkpoint, the newer ones that are damaged, and lines for the log: what was passed over, and a tracker that
        names what is not there.

    Raises:
        CheckpointError: see ``open_run``.
    """
    directory = cfg.run_directory / "checkpoints"
    found, damaged = find_newest(directory, check_hashes=check_hashes)
    lost = [str(line) for line in (*damaged, *set_aside_before(directory))]
    if found is None and lost:
        raise CheckpointError(
            "the run directory holds no sound checkpoint, only damaged ones:\n    " + "\n    ".join(lost),
            source=str(directory),
            remedy="restore one of them from a copy; another --run-name starts afresh",
        )
    if found is not None and not cfg.checkpoint.resume:
        raise CheckpointError(
            f"the run directory holds a checkpoint at iteration {found.iteration} already",
            source=str(found.path),
            remedy="--resume continues it; another --run-name starts afresh",
        )
    fault = tracker_fault(directory, found)
    newer = [*map(str, damaged), *([] if fault is None else [fault])]
    if newer and cfg.checkpoint.strict_resume:
        sound = "nothing sound is there" if found is None else f"{found.path.name} is the newest sound one"
        raise CheckpointError(
            f"the run would not go on from its newest checkpoint ({sound}):\n    " + "\n    ".join(newer),
            source=f"{directory}, with strict_resume",
            remedy="restore what is damaged from a copy; without --strict-resume it is passed over",
        )
    notes = [f"passed over {line}" for line in newer]
    if found is None:
        return None, [], notes
    if lacking := [name for name, is_sound in _RESUMED.items() if not is_sound(found.state.get(name))]:
        raise CheckpointError(
            f"no training run wrote this checkpoint: it does not say {', '.join(lacking)}",
            source=str(found.path / RUN_STATE),
            remedy="--load-weights starts another run from its weights",
        )
    return found, damaged, notes + check_provenance(found.state, cfg, source=str(found.path))


def continued(cfg: RunConfig) -> tuple[Found | None, list[str]]:
    """As ``restorable``, for the run that owns the directory: what is damaged loses its checkpoint's name.

    A run that starts afresh moves out of its way what one before it has logged, whose checkpoints are gone. Files that
    a killed run had begun to write are removed.
    """
    found, damaged, notes = restorable(cfg)
    for folder in (cfg.run_directory, cfg.run_directory / "checkpoints"):
        for name in filter(_BEGINNING.fullmatch, names_in(folder)):
            (folder / name).unlink(missing_ok=True)
    notes += [f"set aside as {set_aside(line.path)}" for line in damaged]
    if found is not None and tracker_fault(found.path.parent, found) is not None:
        write_tracker(found.path.parent, found.iteration)
    logs = (cfg.run_directory / name for name in _LOGS) if found is None else ()
    notes += [f"kept of a run before: {set_aside(log, 'before')}" for log in logs if log.is_file()]
    return found, notes
