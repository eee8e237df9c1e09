"""Weights of another run, or of a conversion, to start from or to be held against; never its optimizer or position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from megatron_vpmoe.config import geometry_diff, stored_faults
from megatron_vpmoe.config.parameters import EMBEDDING
from megatron_vpmoe.config.rules import OF_MODEL, find_problems
from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime.finite import require_finite
from megatron_vpmoe.training import checkpoint
from megatron_vpmoe.training.checkpoint_hashes import with_all_ranks
from megatron_vpmoe.training.torch_dist import Reader

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_SHOWN = 8


def load_initial_weights(model: VPModel, cfg: RunConfig) -> checkpoint.Found:
    """Fill ``model`` from ``cfg.checkpoint.load_weights``; see ``find_weights`` and ``load_weights``."""
    key = "checkpoint.load_weights"
    found = find_weights(cfg, str(cfg.checkpoint.load_weights), key)
    load_weights(model, found, key)
    return found


def load_initial_embedding(model: VPModel, cfg: RunConfig) -> checkpoint.Found:
    """Fill the embedding of ``model`` from ``cfg.checkpoint.load_embedding``, of any geometry; a collective.

    Raises:
        CheckpointError: there is no usable checkpoint, or its embedding is of another shape.
        NonFiniteError: a value is nan or infinite.
    """
    key, weight = "checkpoint.load_embedding", model.get_parameter(EMBEDDING)
    found = with_all_ranks(lambda: checkpoint.open_checkpoint(Path(str(cfg.checkpoint.load_embedding))))
    source, reader = f"{key} = {found.path}", Reader(found.path)
    stored = reader.tensors().get(EMBEDDING)
    there, here = None if stored is None else tuple(stored.size), tuple(weight.shape)
    _refuse([f"{EMBEDDING}: {there or 'absent'} -> {here}"] if there != here else [], source)
    table = reader.tensor(EMBEDDING)
    require_finite(table, EMBEDDING, source=source, remedy="name an earlier checkpoint, or another run")
    weight.data.copy_(table)
    return found


def find_weights(cfg: RunConfig, path: str, key: str) -> checkpoint.Found:
    """The checkpoint of this run's geometry at ``path``; a collective. No weight is allocated.

    Args:
        path: a checkpoint, or a run whose newest is meant.
        key: of the field that names it, for messages.

    Raises:
        CheckpointError: there is no usable checkpoint, or it is of a model that computes something else. Everything
            that differs is named.
    """
    found = with_all_ranks(lambda: checkpoint.open_checkpoint(Path(path)))
    refuse_another_geometry(found.state.get("config"), cfg, f"{key} = {found.path}")
    return found


def refuse_another_geometry(geometry: object, cfg: RunConfig, source: str) -> None:
    """Hold the sections ``model`` and ``moe`` of a model to a run's; raises :class:`CheckpointError`."""
    _refuse([str(change) for change in geometry_diff(_stored_config(geometry, cfg, source), cfg)], source)


def geometry_of(cfg: RunConfig, path: str, key: str) -> tuple[checkpoint.Found, RunConfig]:
    """The checkpoint of any geometry at ``path``, and ``cfg`` with it, for a model that is not trained; a collective.

    Raises:
        CheckpointError: there is no usable checkpoint; its vocabulary is padded to another size; or the processes of
            this run cannot hold it. Everything that is wrong is named.
    """
    found = with_all_ranks(lambda: checkpoint.open_checkpoint(Path(path)))
    source = f"{key} = {found.path}"
    stored = _stored_config(found.state.get("config"), cfg, source)
    sizes = [stored.model.padded_vocab_size, cfg.model.padded_vocab_size]
    _refuse([f"padded_vocab_size: {sizes[0]} -> {sizes[1]}"] if sizes[0] != sizes[1] else [], source)
    untrained = {"train_only": None, "recompute_granularity": None, "recompute_method": None}
    untrained |= {"recompute_num_layers": None, "recompute_modules": None}
    # Experts are spread over the run's groups; a model without any is held whole by each of their ranks.
    ranks = {} if stored.moe.num_experts is not None else {"expert_model_parallel_size": 1}
    stored = stored.model_copy(
        update={
            "training": stored.training.model_copy(update=untrained),
            "parallel": stored.parallel.model_copy(update=ranks),
        }
    )
    _refuse([problem.text for problem in find_problems(stored, rules=OF_MODEL)], source)
    return found, stored


def load_weights(model: VPModel, found: checkpoint.Found, key: str) -> None:
    """Fill ``model`` from a checkpoint of ``find_weights``; a collective.

    Any tensor-, pipeline-, expert- and data-parallel size may have written it; dtypes are converted.

    Raises:
        CheckpointError: a tensor is absent or of another shape; all are named.
        NonFiniteError: a value is nan or infinite, on the rank that holds it.
    """
    _refuse(_tensor_differences(model, found), f"{key} = {found.path}")
    checkpoint.load(found, model)
    for name, tensor in model.state_dict().items():
        if isinstance(tensor, torch.Tensor):
            remedy = "name an earlier checkpoint, or other weights: a model that has diverged is of no use to anything"
            require_finite(tensor, name, source=f"{key} = {found.path}", remedy=remedy)


def _refuse(differing: list[str], source: str) -> None:
    if differing:
        more = [f"and {len(differing) - _SHOWN} more"] if len(differing) > _SHOWN else []
        raise CheckpointError(
            "the weights are of another model (checkpoint -> this run):\n    "
            + "\n    ".join([*differing[:_SHOWN], *more]),
            source=source,
            remedy="set the fields back, or name weights of this model",
        )


def _stored_config(stored: object, cfg: RunConfig, source: str) -> RunConfig:
    """``cfg`` with a stored geometry."""
    try:
        if not isinstance(stored, dict) or not {"model", "moe"} <= stored.keys():
            raise CheckpointError("it does not say its geometry: config.model and config.moe")
        return type(cfg).model_validate_json(
            json.dumps({**cfg.model_dump(mode="json"), "model": stored["model"], "moe": stored["moe"]})
        )
    except (CheckpointError, ValidationError) as error:
        faults = [error.what] if isinstance(error, CheckpointError) else stored_faults(error)
        raise CheckpointError(
            f"the model cannot be built here: {'; '.join(faults)}",
            source=source,
            remedy="name other weights, or import these again (vpmoe hf export where they were trained, then import)",
        ) from error


def _tensor_differences(model: VPModel, found: checkpoint.Found) -> list[str]:
    stored = Reader(found.path).tensors()
    here = {key: shape for keys in checkpoint.stored_tensors(model).values() for key, shape in keys.items()}
    there = {key: tuple(stored[key].size) if key in stored else None for key in here}
    return [f"{key}: {there[key] or 'absent'} -> {shape}" for key, shape in here.items() if there[key] != shape]
