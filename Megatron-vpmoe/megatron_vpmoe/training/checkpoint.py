"""Checkpoints in Megatron's distributed format: written whole or not at all, checked before they are trusted.

A run keeps them under ``<run_dir>/checkpoints``: ``iter_0000100/`` holds torch_dist's files, ``run_state.json`` (what
the checkpoint is: iteration, cursor, configuration, provenance) and ``files.json`` (size and sha256 of every file,
written last). A directory without a matching ``files.json`` is not a checkpoint. Upstream's tracker file,
``latest_checkpointed_iteration.txt``, moves last and is a hint only: resuming looks at the directories themselves.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.files import first_damage, list_files
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.device import has_gpu

ASSETS = "assets"
TRACKER = "latest_checkpointed_iteration.txt"
_NAME = re.compile(r"iter_(\d{7})")
# Optimizer state that loads at any data- and expert-parallel size.
# Upstream adds process groups to the mapping that it is handed: hand it a copy.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Found:
    """A complete checkpoint: its directory and what run_state.json says of it."""

    path: Path
    state: dict[str, Any]

    @property
    def iteration(self) -> int:
        return int(self.state["iteration"])


@dataclass(frozen=True)
class Carried:
    """What an export needs besides weights: a conversion or the dataset gave it, each checkpoint hands it on.

    Attributes:
        state: entries of ``run_state.json``: the vocabulary's true size, and what HF's configuration said besides.
        assets: files under ``assets/`` by name: the tokenizer's.
    """

    state: dict[str, Any]
    assets: dict[str, bytes]

    @classmethod
    def of(cls, found: Found | None) -> Carried:
        """What ``found`` holds; nothing if there is no checkpoint."""
        if found is None:
            return cls({}, {})
        files = sorted((found.path / ASSETS).glob("*"))
        state = {key: found.state[key] for key in ("vocab_size", "hf_config") if key in found.state}
        return cls(state, {file.name: file.read_bytes() for file in files})


def damage(path: Path, *, check_hashes: bool = True) -> str | None:
    """Why ``path`` is not a complete checkpoint; None if it is."""
    listing = path / "files.json"
    if not listing.is_file():
        return "files.json is missing: the save did not finish"
    try:
        files: dict[str, dict[str, Any]] = json.loads(listing.read_text())
    except ValueError as error:
        return f"files.json is not JSON: {error}"
    return first_damage(path, files, check_hashes=check_hashes)


def find_newest(directory: Path, *, check_hashes: bool = True) -> tuple[Found | None, list[str]]:
    """The newest complete checkpoint under ``directory``, and a line for every newer one that was passed over."""
    passed_over: list[str] = []
    candidates = [p for p in directory.glob("iter_*") if _NAME.fullmatch(p.name)] if directory.is_dir() else []
    for path in sorted(candidates, reverse=True):
        reason = damage(path, check_hashes=check_hashes)
        if reason is None:
            return Found(path, json.loads((path / "run_state.json").read_text())), passed_over
        passed_over.append(f"{path}: {reason}")
    return None, passed_over


def open_checkpoint(path: Path) -> Found:
    """A checkpoint directory, or the newest one under a run or checkpoints directory.

    Raises:
        CheckpointError: there is none, or the one named is damaged.
    """
    if _NAME.fullmatch(path.name):
        reason = damage(path) if path.is_dir() else "no such directory"
        if reason is not None:
            raise CheckpointError(f"unusable checkpoint: {reason}", source=str(path), remedy="choose another one")
        return Found(path, json.loads((path / "run_state.json").read_text()))
    directory = path / "checkpoints" if (path / "checkpoints").is_dir() else path
    found, passed_over = find_newest(directory)
    if found is None:
        raise CheckpointError(
            "no complete checkpoint" + "".join(f"\n  passed over {line}" for line in passed_over),
            source=str(directory),
            remedy="train first, or name a directory that holds iter_* checkpoints",
        )
    return found


def save(
    directory: Path,
    run_state: dict[str, Any],
    model: Any,
    optimizer: Any,
    scheduler: Any,
    *,
    carried: Carried | None = None,
) -> Path:
    """Write one checkpoint; a collective. Returns its directory.

    Written under a temporary name, fsynced, renamed; then the tracker moves. A crash at any moment leaves the older
    checkpoints as they were.

    Args:
        directory: ``<run_dir>/checkpoints``.
        run_state: JSON-able; must hold ``iteration``.
        model: the bare model.
        optimizer: a MegatronOptimizer.
        scheduler: an OptimizerParamScheduler.
        carried: from the checkpoint that the run started from.
    """
    final = directory / f"iter_{run_state['iteration']:07d}"
    partial = directory / f"{final.name}.partial"
    if distributed.rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    model_state = model.sharded_state_dict(metadata=dict(METADATA))
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, metadata=dict(METADATA)),
        "scheduler": scheduler.state_dict(),
        "rng": _rng_object(_rng_state()),
    }
    dist_checkpointing.save(state, str(partial), content_metadata=METADATA)
    dist.barrier()
    if distributed.rank() == 0:
        for name, content in carried.assets.items() if carried else ():
            (partial / ASSETS).mkdir(exist_ok=True)
            (partial / ASSETS / name).write_bytes(content)
        seal(partial, final, {**run_state, **(carried.state if carried else {})})
    dist.barrier()
    return final


def seal(partial: Path, final: Path, run_state: dict[str, Any]) -> None:
    """Make a directory of torch_dist files a checkpoint: state, list of files with hashes, fsync, rename, tracker.

    Args:
        partial: a finished directory beside ``final``; gone afterwards.
        final: ``iter_NNNNNNN``; replaced where it exists.
        run_state: JSON-able; holds ``iteration``.
    """
    _write_synced(partial / "run_state.json", json.dumps(run_state, indent=1))
    for file in partial.rglob("*"):
        if file.is_file():
            _fsync(file)
    files = list_files(partial)
    _write_synced(partial / "files.json", json.dumps(files, indent=1))
    _fsync(partial)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    tracker = final.parent / f"{TRACKER}.partial"
    _write_synced(tracker, f"{run_state['iteration']}\n")
    os.replace(tracker, final.parent / TRACKER)
    _fsync(final.parent)


def load(found: Found, model: Any, optimizer: Any = None, scheduler: Any = None) -> None:
    """Read a checkpoint into the bare model, and into the optimizer and scheduler if given; a collective.

    The random state is restored when the number of processes is the one that saved it; another number continues the
    same data order and schedule with this run's own seed (the model draws no random numbers while training).
    """
    model_state = model.sharded_state_dict(metadata=dict(METADATA))
    state: dict[str, Any] = {"model": model_state}
    same_world = found.state["world_size"] == distributed.world_size()
    if optimizer is not None:
        state["optimizer"] = optimizer.sharded_state_dict(model_state, is_loading=True, metadata=dict(METADATA))
        if same_world:
            state["rng"] = _rng_object(_rng_state())
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=FutureWarning, module="megatron.core")
        loaded = cast(dict[str, Any], dist_checkpointing.load(state, str(found.path)))
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        if same_world:
            _set_rng_state(loaded["rng"])
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])


def stored_tensors(model: Any) -> dict[str, dict[str, tuple[int, ...]]]:
    """Where a checkpoint keeps each tensor of the model's state: name -> {key: global shape}.

    Most have one key, their own name. Others are kept in sections along their first axis, in order, so that they load
    at any tensor-parallel size; or under upstream's name for them.
    """
    found: dict[str, dict[str, tuple[int, ...]]] = {}
    for name, value in model.sharded_state_dict(metadata=dict(METADATA)).items():
        parts = value.build() if isinstance(value, ShardedTensorFactory) else [value]
        parts = list(parts.values()) if isinstance(parts, dict) else parts
        keys = {part.key: tuple(part.global_shape) for part in parts if isinstance(part, ShardedTensor)}
        if keys:
            found[name] = keys
    return found


def prune(directory: Path, *, keep_last: int, keep_every: int | None) -> list[Path]:
    """Remove complete checkpoints beyond the newest ``keep_last`` and the multiples of ``keep_every``; rank 0 only."""
    complete = sorted(
        (p for p in directory.glob("iter_*") if _NAME.fullmatch(p.name) and (p / "files.json").is_file()), reverse=True
    )
    removed = []
    for path in complete[keep_last:]:
        iteration = int(path.name.removeprefix("iter_"))
        if keep_every is None or iteration % keep_every:
            (path / "files.json").unlink()  # From here on it is incomplete, whatever becomes of the removal.
            shutil.rmtree(path)
            removed.append(path)
    return removed


def _rng_state() -> dict[str, Any]:
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if has_gpu() else None,
        "tracker": _rng_tracker().get_states(),
    }


def _set_rng_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["cpu"])
    if has_gpu() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    _rng_tracker().set_states(state["tracker"])


def _rng_tracker() -> Any:
    return get_cuda_rng_tracker()


def _rng_object(state: dict[str, Any]) -> ShardedObject:
    return ShardedObject("rng", state, (distributed.world_size(),), (distributed.rank(),), replica_id=0)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
