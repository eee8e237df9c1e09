"""What a checkpoint holds and where it comes from, as ``vpmoe checkpoint inspect`` tells it; no tensor is read."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from megatron_vpmoe.config import layer_geometries, parameter_count
from megatron_vpmoe.errors import VpmoeError
from megatron_vpmoe.training.elapsed import TOKENS
from vpmoe.checkpoints.places import find, is_count, origin_of, state_of
from vpmoe.checkpoints.soundness import Listed, damages, listed
from vpmoe.hf.convert import read_config
from vpmoe.weights import LazyTensor
from vpmoe.weights.geometry import config_of
from vpmoe.weights.megatron_checkpoint import RUN_STATE

OPTIMIZER = "optimizer.state."
# In the order in which they are looked for, under our names and HF's.
_GROUPS = {
    "embedding": r"embed",
    "output layer": r"^(output_layer|lm_head)\.",
    "norms": r"norm\.",
    "attention": r"attn|attention",
    "router": r"\.router\.|\.mlp\.gate\.",
    "shared experts": r"shared_expert",
    "routed experts": r"\.experts\.",
    "dense feed-forward": r"\.mlp\.",
    "other": r"",
}
_LAYOUT = {
    "tensor": "tensor_model_parallel_size",
    "pipeline": "pipeline_model_parallel_size",
    "expert": "expert_model_parallel_size",
}


def group_of(key: str) -> str:
    """Which part of a model a tensor belongs to, that of an optimizer to its parameter's."""
    name = key.removeprefix(f"{OPTIMIZER}{state_name(key)}.")
    return next(group for group, pattern in _GROUPS.items() if re.search(pattern, name))


def state_name(key: str) -> str:
    """``weights``, or which state of the optimizer a tensor is: "momentum_buffer"."""
    return key.removeprefix(OPTIMIZER).split(".")[0] if key.startswith(OPTIMIZER) else "weights"


def by_group(tensors: Mapping[str, LazyTensor]) -> dict[str, dict[str, dict[str, Any]]]:
    """State ("weights" first) -> part of the model -> ``tensors``, ``elements``, ``bytes``, ``dtypes``."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for key, tensor in tensors.items():
        groups = found.setdefault(state_name(key), {})
        entry = groups.setdefault(group_of(key), {"tensors": 0, "elements": 0, "bytes": 0, "dtypes": []})
        entry["tensors"] += 1
        entry["bytes"] += tensor.nbytes
        entry["elements"] += tensor.nbytes // tensor.dtype.itemsize
        entry["dtypes"] = sorted({*entry["dtypes"], dtype_name(tensor)})
    states = sorted(found, key=lambda state: (state != "weights", state))
    return {state: {group: found[state][group] for group in _GROUPS if group in found[state]} for state in states}


def dtype_name(tensor: LazyTensor) -> str:
    """Such as "bfloat16"."""
    return str(tensor.dtype).removeprefix("torch.")


def inspected(path: Path) -> dict[str, Any]:
    """Everything that is told of the folder at ``path``, JSON-able; of a run what its newest complete checkpoint holds.

    ``sound`` and ``damages`` are of names and sizes; None where nothing says what the files were. ``unread`` says why
    something else is None.

    Raises:
        CheckpointError: nothing of the kind lies there.
    """
    place = find(path)
    lists = _listed(path)
    faults = None if lists is None else [f"{each.folder.name}: {fault}" for each, found in lists for fault in found]
    whole = {"path": str(path), "kind": place.kind, "sound": None if faults is None else not faults, "damages": faults}
    unread: list[str] = []

    def read(what: str, ask: Callable[[], Any]) -> Any:
        try:
            return ask()
        except VpmoeError as error:
            unread.append(f"{what}: {error.what}")
            return None

    if place.kind == "HF directory":
        config = read("config.json", lambda: read_config(place.path)) or {}
        names = ("model_type", "num_hidden_layers", "hidden_size", "vocab_size")
        told = {"model": {name: config.get(name) for name in names}, "provenance": origin_of(config)}
    else:
        chosen = place.newest()
        state = read("state", lambda: state_of(chosen)) or {}
        told = {"checkpoint": str(chosen), **_of_state(state), "model": read("model", lambda: _model(state))}
    if place.kind == "run":
        told["checkpoints"] = [
            {"name": each.folder.name, "bytes": each.bytes, "sound": not found}
            for each, found in lists or ()
            if each.folder in place.checkpoints
        ]
    receipt = read("receipt", lambda: place.receipt) if place.kind in ("object", "HF directory") else None
    if receipt is not None:
        told["receipt"] = {name: receipt.get(name) for name in ("key", "finished", "seconds", "provenance")}
    told["tensors"] = read("tensors", lambda: by_group(place.tensors()))
    return {**whole, "unread": unread, **told}


def _listed(path: Path) -> list[tuple[Listed, list[str]]] | None:
    try:
        return [(each, damages(each, check_hashes=False)) for each in listed(path)]
    except VpmoeError:
        return None


def _of_state(state: Mapping[str, Any]) -> dict[str, Any]:
    """What ``run_state.json`` says, of a run or of weights alone."""
    config = state.get("config")
    told: dict[str, Any] = {"iteration": state.get("iteration"), "provenance": state.get("provenance")}
    if not isinstance(config, Mapping) or state.get("kind") == "weights":
        return told
    training, data, parallel, optim = (config.get(name) or {} for name in ("training", "data", "parallel", "optim"))
    rows, length, world = state.get("consumed_samples"), data.get("seq_length"), state.get("world_size")
    layout = {name: parallel.get(field, 1) for name, field in _LAYOUT.items()}
    replicas = layout["tensor"] * layout["pipeline"] if all(map(is_count, layout.values())) else 0
    return {
        **told,
        "run": {
            "name": training.get("run_name"),
            "objective": training.get("objective"),
            "iterations": training.get("train_iters"),
            "rows": rows,
            "positions": rows * length if rows is not None and is_count(length) else None,
            "tokens": (state.get("elapsed") or {}).get(TOKENS),
            "skipped_steps": state.get("skipped_steps"),
            "data": state.get("data"),
            "optimizer": optim.get("optimizer"),
        },
        "layout": {
            "processes": world,
            "data": world // replicas if replicas and world is not None else None,
            **layout,
        },
    }


def _model(state: Mapping[str, Any]) -> dict[str, Any]:
    cfg = config_of(state.get("config"), source=RUN_STATE)
    count = parameter_count(cfg)
    return {
        "layers": len(layer_geometries(cfg)),
        "hidden_size": cfg.model.hidden_size,
        "experts": cfg.moe.num_experts,
        "padded_vocab_size": cfg.model.padded_vocab_size,
        "parameters": count.total,
        "active": count.active,
    }
