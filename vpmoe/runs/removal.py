"""A run's directory removed, if everything in it was provably written by runs."""

from __future__ import annotations

import re
from pathlib import Path

from megatron_vpmoe.files import remove_folder
from megatron_vpmoe.metrics.run_store import IDENTITY, LOCK, identity_of
from megatron_vpmoe.ownership import owned
from vpmoe.errors import NotOursError
from vpmoe.runs.registry import RunEntry
from vpmoe.steps.receipt import RECEIPT, UNFINISHED, read_own, read_receipt

_LOGS = r"(metrics\.jsonl|samples\.jsonl|expert_loads\.bin)"
_FILES = re.compile(
    rf"\{LOCK}|{re.escape(IDENTITY)}|config\.yaml|assignment\.json|{_LOGS}|{_LOGS}\.before(\.\d+)?|"
    r"(nonfinite|spike)_\d+_rank\d+[\w.]*\.json|\..+\.tmp"
)
_WANDB = re.compile(r"(offline-run|superseded-run|run)-[\w.-]+|latest-run|debug(-internal|-cli.*)?\.log|settings")
_CHECKPOINTS = re.compile(r"iter_\d{7,}(\.(partial|pruned|damaged|replaced|rolled_back)(\.\d+)?)?")
_LISTED = 5


def foreign_to(directory: Path) -> list[str]:
    """What lies in a run's directory and is not known to be written by a run, by its path in there."""
    from megatron_vpmoe.training.checkpoint_files import TRACKER, is_ours

    foreign = []
    for path in sorted(directory.iterdir()):
        if path.is_symlink() or not (path.is_dir() or _FILES.fullmatch(path.name) or _is_of_a_step(path)):
            foreign.append(path.name)
        elif path.is_dir() and path.name == "checkpoints":
            foreign += [
                f"checkpoints/{each.name}"
                for each in sorted(path.iterdir())
                if not (_CHECKPOINTS.fullmatch(each.name) and is_ours(each)) and each.name != TRACKER
            ]
        elif path.is_dir() and path.name == "wandb":
            foreign += [f"wandb/{each.name}" for each in sorted(path.iterdir()) if not _WANDB.fullmatch(each.name)]
        elif path.is_dir() and not _is_made_by_a_step(path):
            foreign.append(f"{path.name}/")
    return foreign


def _is_of_a_step(path: Path) -> bool:
    """Whether this is a step's record of the run that was made in place."""
    if path.name not in (RECEIPT, UNFINISHED):
        return False
    try:
        return bool(read_own(path))
    except NotOursError:
        return False


def _is_made_by_a_step(folder: Path) -> bool:
    """Whether everything in a folder, such as a run's evaluation, is in its receipt."""
    try:
        made = {*read_receipt(folder)["files"], RECEIPT}
    except NotOursError:
        return False
    inside = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return all(not path.is_symlink() and path.relative_to(folder).as_posix() in made for path in inside)


def check_removable(run: RunEntry) -> int:
    """The bytes that would go with a run's directory.

    Raises:
        NotOursError: the directory is not that run's, or holds what no run writes.
    """
    here = run.directory
    if here.is_symlink() or not here.is_dir() or identity_of(here) != run.id:
        raise NotOursError(
            f"this is not the directory of the run {run.id}",
            source=str(here),
            remedy="remove it yourself; without --files the entry alone goes",
        )
    if foreign := foreign_to(here):
        more = f" and {len(foreign) - _LISTED} more" if len(foreign) > _LISTED else ""
        raise NotOursError(
            f"no run wrote {', '.join(foreign[:_LISTED])}{more}",
            source=str(here),
            remedy="move these away, or remove the directory yourself; without --files the entry alone goes",
        )
    return sum(path.lstat().st_size for path in here.rglob("*") if not path.is_dir())


def remove_files(run: RunEntry) -> None:
    """Remove the directory of a run, the proof of whose it is last: what is interrupted can be brought to its end.

    Raises:
        BusyError: a process works there.
        NotOursError: as ``check_removable``.
    """
    here = run.directory
    with owned(here / LOCK, f"the run directory {here}"):
        check_removable(run)
        remove_folder(here, [here / LOCK, here / IDENTITY])
