"""What lies at a path: a run, one checkpoint, an object with a receipt, or an HF directory."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.files import RECEIPT, read_json
from megatron_vpmoe.software import is_provenance
from vpmoe.steps import read_receipt
from vpmoe.weights import LazyTensor, safetensors_folder

Kind = Literal["run", "checkpoint", "object", "HF directory"]
_REMEDY = "name a run (runs/NAME), a checkpoint in it (iter_NNNNNNN), an object of a ladder, or an HF directory"


@dataclass(frozen=True)
class Place:
    """A folder with weights.

    Attributes:
        path: of it.
        kind: what it is.
        checkpoints: Megatron's in it, the newest first, sound or not; none in an HF directory.
    """

    path: Path
    kind: Kind
    checkpoints: tuple[Path, ...]

    @property
    def receipt(self) -> dict[str, Any] | None:
        """Of the step that made it; None where none did.

        Raises:
            NotOursError: it is damaged.
        """
        return read_receipt(self.path) if (self.path / RECEIPT).is_file() else None

    def newest(self) -> Path:
        """The newest complete checkpoint.

        Raises:
            CheckpointError: there is none.
        """
        from megatron_vpmoe.training.checkpoint_files import open_checkpoint

        if self.kind == "run":
            return open_checkpoint(self.path, check_hashes=False).path
        return self.checkpoints[0]

    def tensors(self) -> dict[str, LazyTensor]:
        """Every tensor by its key in the files, none read yet; of a run those of its newest checkpoint.

        Raises:
            CheckpointError, WeightsError: the files cannot be read.
        """
        return safetensors_folder.read_weights(self.path) if self.kind == "HF directory" else stored(self.newest())


def stored(checkpoint: Path) -> dict[str, LazyTensor]:
    """Every tensor of ``iter_NNNNNNN`` by key, weights and optimizer state: whole, whatever layout wrote it."""
    from functools import partial

    from megatron_vpmoe.training.torch_dist import Reader

    reader = Reader(checkpoint)
    return {
        key: LazyTensor(tuple(entry.size), entry.properties.dtype, partial(reader.tensor, key))
        for key, entry in sorted(reader.tensors().items())
    }


def find(path: Path) -> Place:
    """What lies there.

    Raises:
        CheckpointError: nothing of the kind.
    """
    from megatron_vpmoe.training.checkpoint_files import FILES, by_age

    if not path.is_dir():
        what = "it is no folder" if os.path.lexists(path) else "there is no such folder"
        raise CheckpointError(what, source=str(path), remedy=_REMEDY)
    if path.name.startswith("iter_") or (path / FILES).is_file():
        return Place(path, "checkpoint", (path,))
    if (path / "config.json").is_file():
        return Place(path, "HF directory", ())
    if found := by_age(path / "checkpoints"):
        return Place(path, "run", (*found,))
    if found := by_age(path / "megatron") or by_age(path):
        return Place(path, "object" if (path / RECEIPT).is_file() else "run", (*found,))
    raise CheckpointError("no checkpoint lies there", source=str(path), remedy=_REMEDY)


def state_of(checkpoint: Path) -> dict[str, Any]:
    """``run_state.json`` of a checkpoint, which may be damaged otherwise.

    Raises:
        CheckpointError: it cannot be read, or an entry is not what a run writes.
    """
    from megatron_vpmoe.training.checkpoint_files import RUN_STATE

    path, remedy = checkpoint / RUN_STATE, "choose another checkpoint"
    state = read_json(path, error=CheckpointError, remedy=remedy)
    if strange := [name for name, fits in _STATE.items() if state.get(name) is not None and not fits(state[name])]:
        what = f"{RUN_STATE} is not as a run writes it: {', '.join(strange)}"
        raise CheckpointError(what, source=str(path), remedy=remedy)
    return state


def origin_of(config: dict[str, Any]) -> dict[str, Any] | None:
    """The block of provenance in an HF directory's ``config.json``; None where there is none of ours."""
    return block if is_provenance(block := config.get("provenance")) else None


def is_count(value: Any) -> bool:
    """Whether it is a whole number from 0."""
    return type(value) is int and value >= 0


def _all_objects(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, dict) for each in value.values())


_STATE: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("iteration", "world_size", "consumed_samples", "skipped_steps"), is_count),
    "elapsed": lambda value: isinstance(value, dict),
    "config": _all_objects,
    "provenance": is_provenance,
}
"""What entries of a checkpoint's state are, where they are there."""
