"""From a model and a configuration to one Megatron optimizer."""

# torch._foreach_*: one call (one launch on a GPU) over a list of tensors; torch does not export the names to checkers.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from megatron_vpmoe.optim.adamw import build_adamw, initialize_adamw_state
from megatron_vpmoe.optim.normuon import STACK_BYTES, NorMuon, NorMuonOptions
from megatron_vpmoe.optim.polar_express import compute_dtype
from megatron_vpmoe.optim.routing import RULES, RoutingRow, Rule, routed_parameters
from megatron_vpmoe.optim.sharded_state import ShardedFloat16Optimizer, ShardedFP32Optimizer
from megatron_vpmoe.runtime import device

device.prepare()
from megatron.core import parallel_state  # noqa: E402
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, OptimizerConfig  # noqa: E402

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.config.schema_run import OptimSection


class VpOptimizer(ChainedOptimizer):
    """NorMuon and AdamW, dense and expert, as one optimizer with one global gradient norm.

    Compared to upstream's chain: the norm is taken over all members at once without a host round trip per tensor, and a
    step whose norm is not finite changes nothing.
    """

    @torch.no_grad()
    def get_grad_norm(self) -> float:
        """L2 norm of the whole model's gradient; call after ``prepare_grads``.

        Gradients are complete on every rank of a data-parallel group; what differs between ranks (experts, or tensor-
        and pipeline-parallel shards) is summed over each member's ``grad_stats_parallel_group``.
        """
        squares: dict[Any, list[torch.Tensor]] = {}
        for member in self.chained_optimizers:
            group = member.get_grad_stats_parallel_group()
            grads = member.get_main_grads_for_grad_norm()
            squares.setdefault(group, []).extend(torch._foreach_norm(grads) if grads else ())
        total = torch.zeros((), dtype=torch.float64, device=device.current_device())
        for group, norms in squares.items():
            square = torch.stack(norms).double().square_().sum() if norms else torch.zeros_like(total)
            if torch.distributed.get_world_size(group) > 1:
                torch.distributed.all_reduce(square, group=group)
            total += square
        return math.sqrt(total.item())

    @torch.no_grad()
    def step(self) -> tuple[bool, float, None]:  # type: ignore[override]
        """Clip to the global norm and update.

        Returns:
            whether the update was made, the gradient norm before clipping, and None in the place of upstream's count of
            zeros. With a norm that is not finite no parameter and no state is touched, and the first is False.
        """
        self.prepare_grads()
        grad_norm = self.get_grad_norm()
        return self.clip_and_update(grad_norm), grad_norm, None

    @torch.no_grad()
    def clip_and_update(self, grad_norm: float) -> bool:
        """The second half of ``step``, for a caller that looks at the norm first.

        Args:
            grad_norm: of ``get_grad_norm``, after ``prepare_grads``.

        Returns:
            whether the update was made; False for a norm that is not finite.
        """
        if not math.isfinite(grad_norm):
            return False
        assert self.config is not None
        clip = self.config.clip_grad
        if clip > 0.0 and grad_norm > clip:
            params = (param for member in self.chained_optimizers for param in member.get_parameters())
            torch._foreach_mul_([param.grad for param in params if param.grad is not None], clip / (grad_norm + 1e-6))
        return self.step_with_ready_grads()

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[Any, Any]:
        """Upstream's, with keys by parameter name alone: which member a parameter belongs to is no part of the file."""
        kwargs["metadata"] = {"chained_optim_avoid_prefix": True, **(kwargs.get("metadata") or {})}
        return super().sharded_state_dict(model_sharded_state_dict, is_loading, **kwargs)


def build_optimizer(
    model_chunks: Sequence[torch.nn.Module], cfg: RunConfig, rules: Sequence[Rule] = RULES
) -> VpOptimizer:
    """Route every parameter and build one torch optimizer for each of NorMuon/AdamW x dense/expert.

    Dense parameters and experts (``allreduce`` False) are apart because their gradient statistics are summed over
    different ranks. In bf16 each member keeps fp32 master weights; parameters that are fp32 already stay their own.

    Args:
        model_chunks: the model, wrapped in Megatron's DistributedDataParallel or bare.
        cfg: sections ``optim`` and ``training.bf16``.
        rules: the routing rules.

    Raises:
        ConfigError: from the routing, or for options of NorMuon out of range.
    """
    config = OptimizerConfig(
        optimizer="adam",
        lr=cfg.optim.lr,
        min_lr=cfg.optim.min_lr,
        weight_decay=cfg.optim.weight_decay,
        clip_grad=cfg.optim.clip_grad,
        bf16=cfg.training.bf16,
        params_dtype=torch.bfloat16 if cfg.training.bf16 else torch.float32,
    )
    routed = routed_parameters(list(model_chunks), cfg, rules)
    members: list[MegatronOptimizer] = []
    for expert in (False, True):
        for kind in ("normuon", "adamw"):
            chosen = [(row, param) for row, param in routed if (row.optimizer, row.expert) == (kind, expert)]
            if chosen:
                members.append(_member(kind, expert, _param_groups(chosen, cfg), config, cfg))
    return VpOptimizer(members)


def _param_groups(chosen: list[tuple[RoutingRow, torch.nn.Parameter]], cfg: RunConfig) -> list[dict[str, Any]]:
    """One group for each learning rate and decay, with the keys that Megatron's scheduler and checkpoints read."""
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    for row, param in chosen:
        decoupled = row.lr_field == "decoupled_lr"
        group = groups.setdefault(
            (row.lr, row.weight_decay, decoupled),
            {
                "params": [],
                "lr": row.lr,
                "max_lr": row.lr,
                "min_lr": cfg.optim.min_lr * row.lr / cfg.optim.lr,
                "weight_decay": row.weight_decay,
                # The scheduler's own decay is 1, so this is the decay itself.
                "wd_mult": row.weight_decay,
                "lr_mult": row.lr / cfg.optim.lr,
                "is_expert_parallel": row.expert,
                "is_decoupled_lr": decoupled,
                "default_config": row.lr == cfg.optim.lr,
            },
        )
        group["params"].append(param)
    return list(groups.values())


def _member(
    kind: str, expert: bool, groups: list[dict[str, Any]], config: OptimizerConfig, cfg: RunConfig
) -> MegatronOptimizer:
    optim = cfg.optim
    if kind == "normuon":
        optimizer: torch.optim.Optimizer = NorMuon(
            groups,
            lr=optim.lr,
            options=normuon_options(optim),
            stack_bytes=_mebibytes(optim.normuon_stack_mib),
            tp_group=None if expert else parallel_state.get_tensor_model_parallel_group(),
        )
        initialize = _initialize_normuon_state
    else:
        optimizer = build_adamw(groups, betas=(optim.adam_beta1, optim.adam_beta2), eps=optim.adam_eps)
        initialize = initialize_adamw_state
    wrapper = ShardedFloat16Optimizer if config.bf16 else ShardedFP32Optimizer
    member = wrapper(optimizer, config, initialize)
    member.grad_stats_parallel_group = (
        parallel_state.get_expert_tensor_model_pipeline_parallel_group()
        if expert
        else parallel_state.get_model_parallel_group()
    )
    # The group over which gradients that are alike on all ranks count once; each rank's experts are its own.
    member.tp_group = (
        parallel_state.get_expert_tensor_parallel_group()
        if expert
        else parallel_state.get_tensor_model_parallel_group()
    )
    return member


def normuon_options(optim: OptimSection) -> NorMuonOptions:
    """The section's NorMuon fields, with dtypes; "auto" leaves the choice to the device."""
    return NorMuonOptions(
        momentum=optim.normuon_momentum,
        beta2=optim.normuon_beta2,
        eps=optim.normuon_eps,
        steps=optim.polar_express_steps,
        safety=optim.polar_express_safety,
        compute_dtype=None if optim.polar_express_dtype == "auto" else getattr(torch, optim.polar_express_dtype),
        momentum_dtype=getattr(torch, optim.normuon_momentum_dtype),
        idle_expert_policy=optim.normuon_idle_expert_policy,
    )


def describe_arithmetic(cfg: RunConfig, device_type: str) -> str:
    """One line: what NorMuon computes in and keeps, on a device of this type."""
    optim = cfg.optim
    if optim.optimizer != "normuon":
        return "AdamW, fused, state in float32"
    dtype = normuon_options(optim).compute_dtype or compute_dtype(device_type)
    stack = optim.normuon_stack_mib or STACK_BYTES[device_type] // 2**20
    name = str(dtype).removeprefix("torch.")
    forms = "on X" if dtype == torch.bfloat16 else "on the Gram matrix where that is less work, else on X"
    return (
        f"NorMuon: Polar Express in {name}, {forms}; momentum in {optim.normuon_momentum_dtype}; "
        f"stacks of up to {stack} MiB; idle experts: {optim.normuon_idle_expert_policy}"
    )


def _mebibytes(count: int | None) -> int | None:
    return None if count is None else count * 2**20


def _initialize_normuon_state(optimizer: torch.optim.Optimizer, _config: object = None) -> None:
    assert isinstance(optimizer, NorMuon)
    optimizer.initialize_state()
