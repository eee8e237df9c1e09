"""Rung 6: the dense feed-forward of every layer but the first becomes a shared expert and routed experts.

The dense width D is cut into G = D / F slices of the routed experts' width F; with a gate (SwiGLU) a slice has the
same rows of the gate and of the up projection. Three initialisations:

- ``zero_out``: the shared expert is the dense feed-forward; routed experts have a slice's first matrix with noise, and
  a second matrix of zeros. The same function.
- ``virtual_groups``: G consecutive experts hold the G slices and share one router row, so a token that is sent to one
  of them is sent to all, and gets the whole dense feed-forward from the routed side: a fraction f of it, the shared
  expert giving 1 - f. Normalised gates sum to the scaling factor s, so every chosen expert's is s / G when all of a
  group are equal: second matrices are scaled by f G / s, their biases by f / s. The same function. (Virtual groups:
  arXiv 2410.07524.)
- ``copy_plus_noise``: the same scales with noise on the copies and router rows of their own: equal on average only.

Router rows are small seeded noise and expert biases are zero. Which experts a token prefers does not depend on the
size of the noise, but how soon the expert bias, in its small steps, evens out what the noise prefers does.

Shapes: E experts, G slices, F width of a routed expert, D = G F dense width, C hidden, A what a first matrix makes of
F (F, or 2 F with a gate).
"""

from __future__ import annotations

import functools
import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from megatron_vpmoe.config import RunConfig
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.expert_checks import experts_reached
from vpmoe.upcycle.job import DrawingSettings, Job, Product, Task
from vpmoe.upcycle.rung_below import (
    RungBelow,
    below_and_written,
    in_layer,
    layer_and_name,
    logits_of,
    refuse_other_changes,
    require_same_logits,
)
from vpmoe.weights import Weights
from vpmoe.weights.tensors import LazyTensor, LogitDifference, random_prompts

_FEED_FORWARD = "mlp."
_NOISE = {"zero_out": 0.02, "copy_plus_noise": 0.1}


class ExpertsSettings(DrawingSettings):
    """Settings of ``experts``."""

    init_experts: Literal["zero_out", "virtual_groups", "copy_plus_noise"] = "virtual_groups"
    """How routed experts begin; the first two keep the function."""
    routed_fraction: float | None = Field(default=None, gt=0, le=1)
    """f, the part of the dense feed-forward that routed experts give; None is a half. ``zero_out`` has none."""
    noise: float | None = Field(default=None, ge=0)
    """On copies, in units of the root mean square of the matrix; None is 0.02 in ``zero_out``, 0.1 in
    ``copy_plus_noise``. ``virtual_groups`` has none."""
    router_std: float = Field(default=0.01, gt=0)
    """Standard deviation of a router's logits for inputs of unit mean square."""
    prompt_lengths: tuple[int, ...] = Field(default=(1, 7, 33), min_length=1)
    """Lengths of the prompts (of random tokens) on which the two models are compared."""
    logit_tolerance: float = Field(default=1e-5, gt=0)
    """Largest allowed logit difference of an exact initialisation in fp32, relative to the largest logit where that is
    above 1."""
    reach_tokens: int = Field(default=2048, ge=1)
    """Random tokens whose choice of experts the receipt counts."""

    @model_validator(mode="after")
    def _no_idle_setting(self) -> ExpertsSettings:
        if self.init_experts == "zero_out" and self.routed_fraction is not None:
            raise ValueError("routed_fraction: zero_out has none")
        if self.init_experts == "virtual_groups" and self.noise is not None:
            raise ValueError("noise: virtual_groups has none")
        return self


class Experts(Job[ExpertsSettings]):
    """``model`` (a dense rung) -> the same stack with routed experts."""

    name: ClassVar[str] = "experts"
    roles: ClassVar[tuple[str, ...]] = ("model",)
    settings_type = ExpertsSettings

    def convert(self, task: Task[ExpertsSettings]) -> Product:
        below = RungBelow.open(task.inputs["model"])
        refuse_other_changes(task, below, set(type(task.cfg.moe).model_fields))
        conversion = Conversion.of(task.cfg, below.cfg, task.settings, source=task.spec.id)
        task.report.update(
            init_experts=task.settings.init_experts,
            slices=conversion.slices,
            routed_fraction=conversion.fraction,
            second_matrix_scale=conversion.scale,
            second_bias_scale=conversion.bias_scale,
        )
        # Computed in fp32, kept in the dtype of the feed-forward that it is computed from.
        dtype = below.weights[in_layer(0, "mlp.linear_fc2.weight")].dtype
        weights = converted(below.weights, conversion)
        return below.product(
            task.cfg, {name: tensor.to(dtype) if ".mlp." in name else tensor for name, tensor in weights.items()}
        )

    def verify(self, task: Task[ExpertsSettings], folder: Path) -> dict[str, Any]:
        below, written = below_and_written(task, folder)
        settings = task.settings
        conversion = Conversion.of(task.cfg, below.cfg, settings, source=task.spec.id)
        prompts = random_prompts(below.carried.vocab_size, settings.prompt_lengths, settings.seed)
        before = logits_of(below.cfg, below.weights, prompts, source=task.inputs["model"].spec.id)
        # The conversion is held to its promise in fp32; what the dtype on disk costs is reported beside it.
        in_fp32 = LogitDifference.between(
            before, logits_of(task.cfg, converted(below.weights, conversion), prompts, source=task.spec.id)
        )
        on_disk = LogitDifference.between(before, logits_of(task.cfg, written, prompts, source=task.spec.id))
        exact = settings.init_experts != "copy_plus_noise"
        if exact:
            require_same_logits(in_fp32, settings.logit_tolerance, settings.init_experts, source=task.spec.id)
        return {
            "exact": exact,
            "in_fp32": in_fp32.as_json(),
            "as_written": on_disk.as_json(),
            "experts_reached": experts_reached(
                task.cfg, written, settings.reach_tokens, below.carried.vocab_size, settings.seed, source=task.spec.id
            ),
        }


@dataclass(frozen=True)
class Conversion:
    """The numbers of one dense-to-sparse conversion.

    Attributes:
        cfg: the sparse geometry.
        settings: of the job.
        slices: G.
        fraction: f; 0 for ``zero_out``.
        scale: of the routed second matrices.
        bias_scale: of the routed second biases.
    """

    cfg: RunConfig
    settings: ExpertsSettings
    slices: int
    fraction: float
    scale: float
    bias_scale: float

    @classmethod
    def of(cls, cfg: RunConfig, old: RunConfig, settings: ExpertsSettings, *, source: str) -> Conversion:
        """Check that the geometry allows the initialisation.

        Raises:
            UpcycleError: it does not.
        """
        dense, moe = cfg.model.ffn_hidden_size, cfg.moe
        if old.moe.num_experts is not None or moe.num_experts is None:
            raise UpcycleError(
                f"from {old.moe.num_experts} to {moe.num_experts} experts", source=source, remedy="from none to some"
            )
        slices = dense // moe.moe_ffn_hidden_size
        demands = {
            "moe_shared_expert_intermediate_size": moe.moe_shared_expert_intermediate_size == dense,
            "moe_ffn_hidden_size": slices * moe.moe_ffn_hidden_size == dense,
        }
        if settings.init_experts == "virtual_groups":
            per_routing_group = moe.num_experts // (moe.moe_router_num_groups or 1)
            demands |= {
                "num_experts": moe.num_experts % slices == 0,
                "moe_router_topk": moe.moe_router_topk % slices == 0 and moe.moe_router_topk > 1,
                "moe_router_num_groups": per_routing_group % slices == 0,
            }
        unmet = [f"{name} = {getattr(moe, name)}" for name, met in demands.items() if not met]
        if unmet:
            raise UpcycleError(
                f"{settings.init_experts} cannot cut a dense width of {dense} into this geometry: {', '.join(unmet)}",
                source=source,
                remedy="the shared expert is as wide as the dense feed-forward, routed experts divide it into G "
                "slices; virtual_groups needs multiples of G (and more than one) chosen, in all, and per routing group",
            )
        gates = moe.moe_router_topk_scaling_factor or 1.0
        fraction = 0.0 if settings.init_experts == "zero_out" else settings.routed_fraction or 0.5
        return cls(cfg, settings, slices, fraction, fraction * slices / gates, fraction / gates)


def converted(weights: Weights, conversion: Conversion) -> dict[str, LazyTensor]:
    """The sparse model's tensors; feed-forwards are computed in fp32, everything else is as it was."""
    result: dict[str, LazyTensor] = {}
    for name, tensor in weights.items():
        place = layer_and_name(name)
        if place and place[1].startswith(_FEED_FORWARD) and conversion.cfg.is_moe_layer(place[0] + 1):
            index, inner = place
            linear = inner.removeprefix(_FEED_FORWARD)
            share = 1 - conversion.fraction if linear.startswith("linear_fc2") else 1.0
            result[in_layer(index, f"mlp.shared_experts.{linear}")] = _computed(
                tensor.shape, functools.partial(_scaled, tensor, share)
            )
            result |= _routed(index, linear, tensor, conversion)
            if linear == "linear_fc1.weight":
                result |= _router(index, tensor.shape[1], conversion)
        else:
            result[name] = tensor
    return result


def _routed(index: int, linear: str, dense: LazyTensor, conversion: Conversion) -> dict[str, LazyTensor]:
    """One of the four stacks of routed experts, from the dense tensor that it is cut from."""
    name = in_layer(index, f"mlp.experts.{linear.removeprefix('linear_').replace('.', '_')}")
    experts, slices = conversion.cfg.moe.num_experts, conversion.slices
    assert experts is not None
    inner = {
        "linear_fc1.weight": (dense.shape[0] // slices, *dense.shape[1:]),
        "linear_fc1.bias": (dense.shape[0] // slices,),
        "linear_fc2.weight": (dense.shape[0], conversion.cfg.moe.moe_ffn_hidden_size),
        "linear_fc2.bias": dense.shape,
    }[linear]
    load = functools.partial(_cut, dense, linear, name, conversion)
    return {name: _computed((experts, *inner), load)}


def _cut(dense: LazyTensor, linear: str, name: str, conversion: Conversion) -> Tensor:
    whole, settings = dense.read().float(), conversion.settings
    experts, slices = conversion.cfg.moe.num_experts or 0, conversion.slices
    if linear == "linear_fc2.bias":
        return (whole * conversion.bias_scale).expand(experts, -1).contiguous()
    if linear == "linear_fc2.weight":
        parts = torch.stack(whole.chunk(slices, dim=1))
    else:
        gated = 2 if conversion.cfg.model.activation == "swiglu" else 1
        parts = whole.unflatten(0, (gated, slices, -1)).transpose(0, 1).flatten(1, 2)
    scale = conversion.scale if linear == "linear_fc2.weight" else 1.0
    stack = parts.repeat(math.ceil(experts / slices), *[1] * whole.dim())[:experts].mul_(scale)
    noise = settings.noise if settings.noise is not None else _NOISE.get(settings.init_experts, 0.0)
    if noise and linear.endswith("weight"):
        size = noise * scale * float(whole.square().mean().sqrt())
        stack += size * torch.randn(stack.shape, generator=_generator(settings.seed, name))
    return stack


def _router(index: int, hidden: int, conversion: Conversion) -> dict[str, LazyTensor]:
    moe, settings = conversion.cfg.moe, conversion.settings
    experts = moe.num_experts or 0
    name = in_layer(index, "mlp.router.weight")
    together = conversion.slices if settings.init_experts == "virtual_groups" else 1
    rows = functools.partial(_router_rows, (experts // together, hidden), together, name, settings)
    router = {name: _computed((experts, hidden), rows)}
    if moe.moe_router_enable_expert_bias:
        router[in_layer(index, "mlp.router.expert_bias")] = LazyTensor.of(torch.zeros(experts))
    return router


def _router_rows(shape: tuple[int, int], together: int, name: str, settings: ExpertsSettings) -> Tensor:
    rows = torch.randn(shape, generator=_generator(settings.seed, name)) * (settings.router_std / math.sqrt(shape[1]))
    return rows.repeat_interleave(together, dim=0)


def _scaled(tensor: LazyTensor, factor: float) -> Tensor:
    return tensor.read().float() * factor


def _computed(shape: tuple[int, ...], load: Any) -> LazyTensor:
    return LazyTensor(tuple(shape), torch.float32, load)


def _generator(seed: int, name: str) -> torch.Generator:
    """Each tensor's own, so that the order of reading does not matter."""
    digest = hashlib.sha256(f"{seed} {name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
