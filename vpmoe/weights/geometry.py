"""From a geometry (the ``model`` and ``moe`` sections of a run's configuration) to the tensors that it has, and to a
model that holds given ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from pydantic import ValidationError

from megatron_vpmoe.config import RunConfig, stored_faults
from megatron_vpmoe.config.rules import OF_MODEL, find_problems
from megatron_vpmoe.runtime.device import prepare
from vpmoe.errors import WeightsError
from vpmoe.weights.tensors import LazyTensor, Weights, check_geometry

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel

# A geometry says nothing of training; these are the smallest values that a whole configuration accepts.
_NO_TRAINING: dict[str, Any] = {
    "optim": {"lr": 1e-3},
    "parallel": {},
    "evaluation": {},
    "checkpoint": {},
    "logging": {},
}


def geometry_of(cfg: RunConfig) -> dict[str, Any]:
    """The part of a configuration that decides names and shapes, JSON-ready: sections ``model`` and ``moe``."""
    return {"model": cfg.model.model_dump(mode="json"), "moe": cfg.moe.model_dump(mode="json")}


def config_of(geometry: Mapping[str, Any] | None, *, source: str, bf16: bool = False) -> RunConfig:
    """A configuration for building the model of a geometry, one process, no training.

    Args:
        geometry: from ``geometry_of``; keys of the two sections that have defaults may be left out.
        source: where it was read, for messages.
        bf16: compute in bfloat16 instead of fp32.

    Raises:
        WeightsError: fields are missing, wrong or unknown, or contradict each other; names all of them.
    """
    if not isinstance(geometry, Mapping) or not isinstance(model := geometry.get("model", {}), Mapping):
        raise WeightsError("it says no geometry", source=source, remedy="name weights with the sections model and moe")
    window = model.get("window_size", 128)
    values = {
        **_NO_TRAINING,
        "data": {"data_path": "(none)", "seq_length": window or 128},
        "training": {
            "run_name": "weights",
            "micro_batch_size": 1,
            "global_batch_size": 1,
            "train_iters": 1,
            "bf16": bf16,
        },
        "model": model,
        "moe": geometry.get("moe", {}),
    }
    try:
        cfg = RunConfig.model_validate(values)
    except ValidationError as error:
        faults = stored_faults(error)
    else:
        faults = [f"{', '.join(problem.names)}: {problem.text}" for problem in find_problems(cfg, rules=OF_MODEL)]
        if not faults:
            return cfg
    raise WeightsError(
        "no model can be built of this geometry:\n    " + "\n    ".join(faults),
        source=source,
        remedy="correct the model and moe sections named above",
    )


@contextlib.contextmanager
def process_groups(seed: int = 1234) -> Iterator[None]:
    """Process groups of this process alone, unless the caller has some already."""
    prepare()
    from megatron.core import parallel_state

    from megatron_vpmoe.runtime.distributed import single_process

    if parallel_state.model_parallel_is_initialized():
        yield
        return
    with single_process(seed):
        yield


@dataclass(frozen=True)
class _Layout:
    """What a geometry decides of its tensors.

    Attributes:
        shapes: name -> shape, in the order of the model.
        keys: name -> {key in a checkpoint: shape}.
        fp32: names of what the architecture keeps in fp32 (sinks, frequencies, value-residual scalars, expert biases).
    """

    shapes: dict[str, tuple[int, ...]]
    keys: dict[str, dict[str, tuple[int, ...]]]
    fp32: frozenset[str]

    @classmethod
    def of(cls, cfg: RunConfig) -> _Layout:
        """From a model on the meta device; process groups must exist."""
        from megatron_vpmoe.model.builder import build_model
        from megatron_vpmoe.training.checkpoint import stored_tensors

        model = build_model(cfg, device=torch.device("meta"))
        fp32 = {name for name, parameter in model.named_parameters() if getattr(parameter, "keep_fp32", False)}
        return cls(
            shapes={name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if _is_tensor(tensor)},
            keys=stored_tensors(model),
            fp32=frozenset(fp32 | {name for name, _ in model.named_buffers()}),
        )


# A conversion asks for the same few layouts again and again; groups and a model each time are most of a small one.
_LAYOUTS: dict[str, _Layout] = {}


def _layout(cfg: RunConfig) -> _Layout:
    prepare()
    from megatron.core import parallel_state

    if parallel_state.model_parallel_is_initialized():
        return _Layout.of(cfg)  # of this rank's part: not to be kept
    key = cfg.model_dump_json()
    if key not in _LAYOUTS:
        with process_groups():
            _LAYOUTS[key] = _Layout.of(cfg)
    return _LAYOUTS[key]


def expected_shapes(cfg: RunConfig) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor in the model's state, global over ranks; nothing is allocated."""
    return dict(_layout(cfg).shapes)


def stored_keys(cfg: RunConfig) -> dict[str, dict[str, tuple[int, ...]]]:
    """Name -> {key in a checkpoint: shape} of every tensor; sections along the first axis where there are several."""
    return dict(_layout(cfg).keys)


def conform(weights: Weights, cfg: RunConfig, dtype: torch.dtype | None, *, source: str) -> dict[str, LazyTensor]:
    """``weights`` in the order of the model, checked against its geometry, cast to ``dtype``.

    What the architecture keeps in fp32 (sinks, frequencies, value-residual scalars, expert biases) is fp32.

    Args:
        weights: every tensor of the model.
        cfg: its geometry.
        dtype: of everything else; None leaves each tensor's own.
        source: of the weights, for messages.

    Raises:
        WeightsError: names or shapes disagree with the geometry.
    """
    layout = _layout(cfg)
    check_geometry(weights, layout.shapes, source=source)
    return {
        name: weights[name].to(torch.float32 if name in layout.fp32 else dtype or weights[name].dtype)
        for name in layout.shapes
    }


def _is_tensor(value: object) -> bool:
    """False for the extra states of Megatron's linear layers, which are always empty."""
    return isinstance(value, torch.Tensor)


def load_model(cfg: RunConfig, weights: Weights, *, source: str, device: torch.device | None = None) -> VPModel:
    """A model in evaluation mode that holds ``weights``; process groups must exist (``process_groups``).

    Here its device is chosen, once; what it is asked goes to ``model.device``.

    Args:
        cfg: its geometry and precision.
        weights: every tensor of the model.
        source: of the weights, for messages.
        device: None: the one that this process computes on. Conversions of the ladder, and comparisons with other code,
            take the CPU by choice: what they make and say must not depend on the card.

    Raises:
        WeightsError: names or shapes disagree with the geometry.
    """
    from megatron_vpmoe.model.builder import build_model

    model = build_model(cfg, device=device)
    own = {name: tensor for name, tensor in model.state_dict().items() if _is_tensor(tensor)}
    check_geometry(weights, {name: tuple(tensor.shape) for name, tensor in own.items()}, source=source)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(weights[name].read())
    return model.eval()
