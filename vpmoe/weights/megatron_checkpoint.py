"""Megatron's distributed checkpoint (torch_dist) as a stream: written and read by one process, tensor by tensor.

What is written here is what ``megatron_vpmoe.training.checkpoint`` writes, without optimizer, scheduler and random
state; it loads at any tensor-, pipeline- and expert-parallel size. What is read may come from a training run of any
such size: the tensors of a checkpoint are global ones.
"""

from __future__ import annotations

import functools
import shutil
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as layout
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.state_dict_saver import save as save_plan

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.files import read_json
from megatron_vpmoe.runtime.device import prepare
from vpmoe.errors import WeightsError
from vpmoe.weights.geometry import config_of, expected_shapes, stored_keys
from vpmoe.weights.tensors import LazyTensor, Weights, check_geometry, tensor_sha256

ITERATION = "iter_0000000"
RUN_STATE = "run_state.json"
# The model's own parts; optimizer and random state of a training run lie beside them.
_MODEL_PARTS = ("embedding.", "decoder.", "output_layer.")


def checkpoint_in(directory: Path) -> Path:
    """Where a conversion's checkpoint lies in the directory that holds it."""
    return directory / ITERATION


def read_state(checkpoint: Path) -> dict[str, Any]:
    """``run_state.json`` of ``iter_NNNNNNN``; raises ``WeightsError`` where it is missing or damaged."""
    return read_json(checkpoint / RUN_STATE, error=WeightsError, remedy="name a complete checkpoint")


def origin_of(state: Mapping[str, Any]) -> dict[str, Any]:
    """What a training run's ``run_state.json`` says of its origin, as ``software.provenance`` takes it; {} of others.

    What is made of the weights tells it on; code, packages and hardware are then those that made it.
    """
    told = state.get("provenance")
    if not isinstance(told, Mapping):
        return {}
    names = {"config_hash": "config_hash", "tokenizer": "tokenizer", "dataset": "dataset_manifest_sha256"}
    return {name: told.get(key) for name, key in names.items()}


def read_config(checkpoint: Path, *, bf16: bool = False) -> RunConfig:
    """The geometry of ``iter_NNNNNNN``, to build its model with; see ``config_of``."""
    return config_of(read_state(checkpoint).get("config"), source=str(checkpoint / RUN_STATE), bf16=bf16)


def sequence_length(checkpoint: Path) -> int | None:
    """Tokens of a row that the run of ``iter_NNNNNNN`` trains on; None where no run made it."""
    data = read_state(checkpoint)["config"].get("data")
    return data["seq_length"] if data else None


class _StreamingPlanner(DefaultSavePlanner):
    """Plans from shapes alone (meta tensors) and computes each tensor when the writer has come to it."""

    def __init__(self, weights: Weights, progress: Callable[[str, int], None]) -> None:
        super().__init__(flatten_state_dict=False)
        self.weights, self.progress = weights, progress
        self.hashes: dict[str, str] = {}

    def lookup_object(self, index: layout.MetadataIndex) -> torch.Tensor:
        tensor = self.weights[index.fqn].read()
        self.hashes[index.fqn] = tensor_sha256(tensor)
        self.progress(index.fqn, tensor.nbytes)
        return tensor


def write_checkpoint(
    directory: Path,
    weights: Weights,
    run_state: dict[str, Any],
    *,
    assets: Sequence[Path] = (),
    progress: Callable[[str, int], None] = lambda name, size: None,
) -> tuple[Path, dict[str, str]]:
    """Write ``directory/iter_0000000``, whole or not at all.

    Args:
        directory: the caller's own, made where it is missing; holds no such checkpoint yet.
        weights: every tensor of the model under its name in the state dict, whole.
        run_state: JSON-able, with the geometry as ``config``; becomes ``run_state.json`` with ``iteration`` 0.
        assets: files to keep beside the weights, in ``assets/``: the tokenizer's, for a later export.
        progress: told each tensor's name and bytes.

    Returns:
        the checkpoint's directory, and name -> ``tensor_sha256``.
    """
    prepare()
    from megatron_vpmoe.training import checkpoint, checkpoint_part

    final = checkpoint_in(directory)
    stored = _under_keys(weights, run_state)
    if final.exists():
        raise WeightsError("a checkpoint lies there", source=str(final), remedy="name another directory")
    partial = checkpoint.begin(final)
    planner = _StreamingPlanner(stored, progress)
    shapes = {name: torch.empty(t.shape, dtype=t.dtype, device="meta") for name, t in stored.items()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*torch.distributed is.*")
        writer = checkpoint_part.Writer(str(partial), thread_count=1)
        try:
            save_plan(shapes, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:  # around what went wrong with a tensor or the disk
            raise error.failures[0][0] from error
    checkpoint_part.write_common(partial, {"content_metadata": checkpoint.METADATA})
    for asset in assets:
        (partial / checkpoint.ASSETS).mkdir(exist_ok=True)
        shutil.copyfile(asset, partial / checkpoint.ASSETS / asset.name)
    checkpoint.seal(partial, final, {"iteration": 0, "world_size": 1, **run_state})
    hashes = {name: planner.hashes.get(name) or tensor_sha256(tensor.read()) for name, tensor in weights.items()}
    return final, hashes


def _under_keys(weights: Weights, run_state: dict[str, Any]) -> dict[str, LazyTensor]:
    cfg = config_of(run_state["config"], source="run_state")
    check_geometry(weights, expected_shapes(cfg), source="the weights to write")
    stored: dict[str, LazyTensor] = {}
    for name, keys in stored_keys(cfg).items():
        tensor, begin = weights[name], 0
        if len(keys) == 1:
            stored[next(iter(keys))] = tensor
            continue
        for key, shape in keys.items():
            part = functools.partial(_rows, tensor, begin, begin + shape[0])
            stored[key] = LazyTensor(shape, tensor.dtype, part)
            begin += shape[0]
    return stored


def _rows(tensor: LazyTensor, begin: int, end: int) -> torch.Tensor:
    return tensor.read()[begin:end]


def read_weights(path: Path) -> dict[str, LazyTensor]:
    """Every model tensor of one checkpoint directory (``iter_NNNNNNN``) under its name, whole; none is read yet.

    Raises:
        CheckpointError: it is no readable checkpoint.
        WeightsError: it lacks a tensor of its own geometry.
    """
    from megatron_vpmoe.training.torch_dist import Reader

    reader = Reader(path)
    stored = {
        name: LazyTensor(tuple(entry.size), entry.properties.dtype, functools.partial(reader.tensor, name))
        for name, entry in reader.tensors().items()
        if name.startswith(_MODEL_PARTS)
    }
    weights: dict[str, LazyTensor] = {}
    for name, keys in stored_keys(read_config(path)).items():
        missing = [key for key in keys if key not in stored]
        if missing:
            raise WeightsError(
                f"the checkpoint has no {missing[0]}",
                source=str(path),
                remedy="its run_state.json asks for it: name a complete checkpoint",
            )
        sections = [stored[key] for key in keys]
        first = sections[0]
        rows = (sum(section.shape[0] for section in sections), *first.shape[1:]) if first.shape else ()
        load = first.load if len(sections) == 1 else functools.partial(_joined, sections)
        weights[name] = LazyTensor(rows, first.dtype, load).finite(name, str(path))
    return weights


def _joined(sections: list[LazyTensor]) -> torch.Tensor:
    return torch.cat([section.read() for section in sections])
