"""Weights of another run, or of a conversion, to start from or to be held against; never its optimizer or position."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from megatron_vpmoe.config import geometry_diff, stored_faults
from megatron_vpmoe.config.parameters import EMBEDDING, in_mixture, parameter_sizes
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


def load_initial(model: VPModel, cfg: RunConfig) -> tuple[checkpoint.Found | None, list[str]]:
    """Fill what of ``model`` the section ``checkpoint`` names other runs for; a collective.

    Returns:
        the checkpoint whose vocabulary the weights mean, None where none is named; and lines for the log.
    """
    named = cfg.checkpoint
    if named.load_weights is not None:
        found = load_initial_weights(model, cfg)
        return found, [f"weights from {found.path}"]
    if named.load_experts is not None:
        experts = load_experts(model, cfg)
        return next(iter(experts.values())), [f"expert {name} from {found.path}" for name, found in experts.items()]
    drawn = ["experts are drawn at random and stay so: checkpoint.load_experts names no runs"]
    told = drawn if cfg.model.layer_type == "mixture" else []
    if named.load_embedding is None:
        return None, told
    found = load_initial_embedding(model, cfg)
    return found, [f"embedding from {found.path}", *told]


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
    found = with_all_ranks(lambda: checkpoint.open_checkpoint(Path(str(cfg.checkpoint.load_embedding))))
    _filled(model, {EMBEDDING: EMBEDDING}, found, f"checkpoint.load_embedding = {found.path}")
    return found


def load_experts(model: VPModel, cfg: RunConfig) -> dict[str, checkpoint.Found]:
    """Fill the experts of a mixture, and the embedding that they share, from ``cfg.checkpoint.load_experts``.

    A collective. Of a denoiser the steps of DDIM are this run's, whatever its own were.

    Returns:
        what each expert is from, by its name.

    Raises:
        CheckpointError: a checkpoint is not usable, of no expert of this mixture or of another geometry; two are of one
            kind; or they are over different embeddings.
        NonFiniteError: a value is nan or infinite.
    """
    key, experts = "checkpoint.load_experts", {one.layer_type: one for one in cfg.model.mixture_experts or ()}
    loaded: dict[str, checkpoint.Found] = {}
    embedding = model.get_parameter(EMBEDDING).data
    before = embedding
    for path in cfg.checkpoint.load_experts or ():
        found = with_all_ranks(lambda path=path: checkpoint.open_checkpoint(Path(path)))
        source = f"{key}: {found.path}"
        stored = _stored_config(found.state.get("config"), cfg, source)
        kind = stored.model.layer_type
        if kind not in experts or kind in loaded:
            what = f"a second {kind}" if kind in loaded else f"a {kind}"
            remedy = f"name one checkpoint each of {', '.join(experts)}"
            raise CheckpointError(f"it is of {what}, for which the mixture has no place", source=source, remedy=remedy)
        alone = cfg.of_expert(experts[kind])
        changes = [change for change in geometry_diff(stored, alone) if change.key != "model.ddim_steps"]
        _refuse([str(change) for change in changes], source)
        _filled(model, {name: in_mixture(kind, name) for name in parameter_sizes(alone)}, found, source)
        if loaded and not torch.equal(before, embedding):
            raise CheckpointError(
                f"its embedding is another one than that of {next(iter(loaded.values())).path}",
                source=source,
                remedy="train the experts over one: the first owns it, the others --load-embedding from it and leave "
                "it as it is (train_only)",
            )
        before, loaded[kind] = embedding.clone(), found
    return loaded


def _filled(model: VPModel, names: dict[str, str], found: checkpoint.Found, source: str) -> None:
    """Fill parameters of ``model`` by their names in a checkpoint, given as name there -> name here."""
    reader = Reader(found.path)
    stored = reader.tensors()
    targets = {there: model.get_parameter(here) for there, here in names.items()}
    shapes = {name: tuple(stored[name].size) if name in stored else None for name in targets}
    wrong = {name: tuple(targets[name].shape) for name, shape in shapes.items() if shape != targets[name].shape}
    _refuse([f"{name}: {shapes[name] or 'absent'} -> {here}" for name, here in wrong.items()], source)
    for name, parameter in targets.items():
        tensor = reader.tensor(name)
        require_finite(tensor, name, source=source, remedy="name an earlier checkpoint, or another run")
        parameter.data.copy_(tensor)


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
