"""Checkpoints in Megatron's distributed format: a run's state written to a folder and read from it, by all ranks."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from numpy.typing import NDArray

from megatron_vpmoe.errors import VpmoeError
from megatron_vpmoe.files import write_atomically
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.device import has_gpu
from megatron_vpmoe.training import torch_dist
from megatron_vpmoe.training.checkpoint_files import (
    ARRAYS,
    ASSETS,
    Found,
    begin,
    find_newest,
    give_up,
    open_checkpoint,
    seal,
)
from megatron_vpmoe.training.checkpoint_part import Part, Written
from megatron_vpmoe.training.saving import Saving

__all__ = [
    "ASSETS",
    "Carried",
    "Found",
    "Saving",
    "begin",
    "find_newest",
    "load",
    "load_arrays",
    "open_checkpoint",
    "save",
    "seal",
    "stored_tensors",
]

# Optimizer state that loads at any data- and expert-parallel size.
# Upstream adds process groups to the mapping that it is handed: hand it a copy.
METADATA = {"distrib_optim_sharding_type": "fully_reshardable", "chained_optim_avoid_prefix": True}


@dataclass(frozen=True)
class Carried:
    """What an export needs besides weights: a conversion or the dataset gave it, each checkpoint hands it on.

    Attributes:
        state: entries of ``run_state.json``: the vocabulary's true size, what HF's configuration said besides, and the
            system and developer messages.
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
        state = {key: found.state[key] for key in ("vocab_size", "hf_config", "prompts") if key in found.state}
        return cls(state, {file.name: file.read_bytes() for file in files})


def save(
    directory: Path,
    run_state: dict[str, Any],
    model: Any,
    optimizer: Any,
    scheduler: Any,
    *,
    arrays: Mapping[str, NDArray[Any]] | None = None,
    carried: Carried | None = None,
    copy: bool = False,
    then: Callable[[Path], list[str]] = lambda _: [],
) -> Saving:
    """Begin to write one checkpoint; a collective.

    Written under a temporary name, each rank's file hashed by its rank, fsynced, renamed; then the tracker moves. A
    crash at any moment leaves the older checkpoints as they were.

    Args:
        directory: ``<run_dir>/checkpoints``.
        run_state: JSON-able; must hold ``iteration``.
        model: the bare model.
        optimizer: a MegatronOptimizer.
        scheduler: an OptimizerParamScheduler.
        arrays: what of the state is too large for JSON, the same on every rank; rank 0 writes it.
        carried: from the checkpoint that the run started from.
        copy: the state may change when this has returned; otherwise once the checkpoint stands.
        then: called on rank 0 with the checkpoint that stands; returns lines for the log.
    """
    began = time.perf_counter()
    final = directory / f"iter_{run_state['iteration']:07d}"
    partial = Path(distributed.from_rank_0(lambda: str(begin(final))))
    model_state = model.sharded_state_dict(metadata=dict(METADATA))
    state = {
        "model": model_state,
        "optimizer": optimizer.sharded_state_dict(model_state, metadata=dict(METADATA)),
        "scheduler": scheduler.state_dict(),
        "rng": _rng_object(rng_state()),
    }
    beside = {f"{ASSETS}/{name}": content for name, content in (carried.assets if carried else {}).items()}
    if arrays:
        stream = io.BytesIO()
        np.savez(stream, **cast(Any, arrays))
        beside[ARRAYS] = stream.getvalue()
    described = deepcopy({**run_state, **(carried.state if carried else {})})

    def finish(written: Sequence[Written]) -> list[str]:
        part.finish(written)
        for name, content in beside.items():
            write_atomically(partial / name, content)
        seal(partial, final, described, {name: entry for each in written for name, entry in each.files.items()})
        return then(final)

    try:
        part = Part(partial, state, dict(METADATA), copy=copy)
    except VpmoeError:  # on every rank
        if distributed.rank() == 0:
            give_up(partial)
        raise
    return Saving(run_state["iteration"], final, part, finish, lambda: give_up(partial), began=began)


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
            state["rng"] = _rng_object(rng_state())
    loaded = torch_dist.read(found.path, state)
    model.load_state_dict(loaded["model"])
    if optimizer is not None:
        optimizer.load_state_dict(loaded["optimizer"])
        if same_world:
            set_rng_state(loaded["rng"])
    if scheduler is not None:
        scheduler.load_state_dict(loaded["scheduler"])


def load_arrays(found: Found) -> dict[str, NDArray[Any]]:
    """The ``arrays`` that the checkpoint was written with; none where it has none."""
    if not (found.path / ARRAYS).exists():
        return {}
    with np.load(found.path / ARRAYS, allow_pickle=False) as arrays:
        return dict(arrays)


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


def rng_state() -> dict[str, Any]:
    """Of every generator of torch and Megatron-Core on this rank."""
    return {
        "cpu": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if has_gpu() else None,
        "tracker": _rng_tracker().get_states(),
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """What ``rng_state`` gave."""
    torch.set_rng_state(state["cpu"])
    if has_gpu() and state["cuda"] is not None:
        torch.cuda.set_rng_state(state["cuda"])
    _rng_tracker().set_states(state["tracker"])


def _rng_tracker() -> Any:
    return get_cuda_rng_tracker()


def _rng_object(state: dict[str, Any]) -> ShardedObject:
    return ShardedObject("rng", state, (distributed.world_size(),), (distributed.rank(),), replica_id=0)
