"""From a model and a configuration to one Megatron optimizer."""

# torch._foreach_*: one call (one launch on a GPU) over a list of tensors; torch does not export the names to checkers.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from megatron_vpmoe.config.memory import STACK_BYTES
from megatron_vpmoe.optim.assignment import RULES, AssignmentRow, Rule, assigned_parameters
from megatron_vpmoe.optim.gathering import Gathering, own_pieces
from megatron_vpmoe.optim.group_sizes import GroupSizes, sum_over
from megatron_vpmoe.optim.normuon import NorMuon, NorMuonOptions
from megatron_vpmoe.optim.polar_express import compute_dtype
from megatron_vpmoe.optim.sharded_optimizer import ShardedOptimizer
from megatron_vpmoe.runtime import device
from megatron_vpmoe.runtime.sharded_data_parallel import BucketGroup, Piece

device.prepare()
from megatron.core.optimizer import ChainedOptimizer, OptimizerConfig  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.config.schema_run import OptimSection


class VpOptimizer(ChainedOptimizer):
    """NorMuon and AdamW, dense and expert, as one optimizer with one global gradient norm.

    Compared to upstream's chain: each data-parallel rank steps its share and the weights are gathered; the norm is
    taken over all members at once without a host round trip per tensor; where it is not finite nothing changes.

    Args:
        members: the chain.
        config: upstream's, the members' own.
        groups: of this rank.
        buckets: in which the weights are gathered, in the order in which they are updated.
        rule_of: the assignment rule of each parameter; ``rules``: all rules' names, the same on every rank.
    """

    def __init__(
        self,
        members: Sequence[ShardedOptimizer],
        config: OptimizerConfig,
        groups: ProcessGroupCollection,
        buckets: Sequence[BucketGroup],
        *,
        rule_of: Mapping[torch.nn.Parameter, str],
        rules: Sequence[str],
    ) -> None:
        super().__init__(list(members))
        self.config, self._rule_of, self._rules = config, rule_of, rules
        self.members = list(members)
        self.finished_updates = 0
        self._gathering = Gathering(buckets)
        # Every rank of these groups takes part, also one that has no such parameters.
        self._norm_groups = {False: (groups.dp_cp, groups.mp), True: (groups.expt_dp, groups.tp_ep_pp)}

    def get_grad_norm(self) -> float:
        """L2 norm of the whole model's gradient, for which the host waits; call after ``prepare_grads``."""
        return math.sqrt(self.squared_grad_norm().item())

    @torch.no_grad()
    def squared_grad_norm(self) -> torch.Tensor:
        """The square of ``get_grad_norm``, fp64 0-d on the device.

        A gradient is complete on the rank that updates its parameter; the sum goes over the data-parallel group and
        over the ranks that hold other parameters (experts, tensor- and pipeline-parallel shards).
        """
        total = torch.zeros((), dtype=torch.float64, device=device.current_device())
        for expert, groups in self._norm_groups.items():
            grads = [g for m in self.members if m.expert == expert for g in m.get_main_grads_for_grad_norm()]
            norms = torch._foreach_norm(grads) if grads else ()
            square = torch.stack(norms).double().square_().sum() if norms else torch.zeros_like(total)
            total += sum_over(groups, square)
        return total

    def step(self) -> tuple[bool, float, None]:  # type: ignore[override]
        """``update`` by the gradient norm; a collective.

        Returns:
            whether the update was made, the gradient norm before clipping, and None in the place of upstream's count of
            zeros. With a norm that is not finite no parameter and no state is touched, and the first is False.
        """
        self.prepare_grads()
        grad_norm = self.get_grad_norm()
        is_finite = math.isfinite(grad_norm)
        if is_finite:
            self.update(grad_norm)
        return is_finite, grad_norm, None

    @torch.no_grad()
    def update(self, grad_norm: float, *, measure: bool = False) -> dict[str, float]:
        """Clip to the global norm; each rank updates its share, then everybody has the weights. A collective.

        Args:
            grad_norm: of all of the gradient, finite; ``prepare_grads`` has been called.
            measure: return ``GroupSizes``' metrics of this update, which moves the weights the same; else nothing.
        """
        assert self.config is not None
        sizes = GroupSizes(self.members, self._rule_of, self._rules, self._norm_groups) if measure else None
        if sizes:
            sizes.gradients()
        clip = self.config.clip_grad
        if clip > 0.0 and grad_norm > clip:
            params = (param for member in self.members for param in member.get_parameters())
            grads = [param.grad for param in params if param.grad is not None]
            if grads:  # a rank whose parameters are all frozen has none
                torch._foreach_mul_(grads, clip / (grad_norm + 1e-6))
        self._gathering.begin()
        for member in self.members:
            member.step_with_ready_grads(self._gathering.updated, sizes.moved if sizes else None)
        self._gathering.finish()
        self.finished_updates += 1
        return sizes.finish() if sizes else {}

    def normuon_flops(self) -> float:
        """Of Polar Express in one step of all ranks; a collective."""
        own = sum(member.optimizer.flops() for member in self.members if isinstance(member.optimizer, NorMuon))
        total = torch.tensor(own, dtype=torch.float64, device=device.current_device())
        if torch.distributed.is_initialized():
            torch.distributed.all_reduce(total)
        return total.item()

    def state_dict(self) -> dict[str, Any]:
        """Of this rank's share; checkpoints go through ``sharded_state_dict``."""
        members = {str(index): member.state_dict() for index, member in enumerate(self.members)}
        return {"finished_updates": self.finished_updates, "members": members}

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, **kwargs: Any
    ) -> dict[str, Any]:
        """The members' state by parameter name: which member, and which rank, had it is no part of the file."""
        members = {
            str(index): member.sharded_state_dict(model_sharded_state_dict, is_loading)
            for index, member in enumerate(self.members)
        }
        return {"finished_updates": self.finished_updates, "members": members}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from what ``sharded_state_dict``'s tensors were read into."""
        self.finished_updates = int(state_dict["finished_updates"])
        for index, member in enumerate(self.members):
            member.load_state_dict(state_dict["members"].get(str(index), {}))
            for state in member.state.values():
                if "step" in state:
                    state["step"].fill_(self.finished_updates)


def build_optimizer(
    model_chunks: Sequence[torch.nn.Module],
    cfg: RunConfig,
    rules: Sequence[Rule] = RULES,
    groups: ProcessGroupCollection | None = None,
) -> VpOptimizer:
    """Assign every parameter and build one torch optimizer for each of NorMuon/AdamW x dense/expert.

    Dense parameters and experts (``allreduce`` False) are apart because they are replicated over different ranks. In
    bf16 each member keeps fp32 master weights; parameters that are fp32 already stay their own.

    Args:
        model_chunks: the model, wrapped in ``ShardedDataParallel``; in a process of its own also bare.
        cfg: sections ``optim`` and ``training.bf16``.
        rules: the assignment rules.
        groups: this rank's process groups; None: those of ``parallel_state``.

    Raises:
        ConfigError: from the assignment, or for options of NorMuon out of range.
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
    groups = ProcessGroupCollection.use_mpu_process_groups() if groups is None else groups
    assigned = assigned_parameters(list(model_chunks), cfg, rules)
    buckets = [bucket for chunk in model_chunks for bucket in getattr(chunk, "sharded_buckets", ())]
    members: list[ShardedOptimizer] = []
    last = dict.fromkeys(buckets, -1)  # that updates anything of a bucket
    for kind in ("adamw", "normuon"):  # the short one first: what it updated travels meanwhile
        for expert in (False, True):
            chosen = [(row, param) for row, param in assigned if (row.optimizer, row.expert) == (kind, expert)]
            if chosen:
                params = [param for _, param in chosen]
                last |= {bucket: len(members) for bucket in buckets if not bucket.params.isdisjoint(params)}
                pieces = own_pieces(params, buckets, groups.expt_dp if expert else groups.dp_cp)
                members.append(_member(kind, expert, _param_groups(chosen, cfg), pieces, config, cfg, groups))
    rule_of, names = {param: row.rule for row, param in assigned}, [rule.name for rule in rules]
    return VpOptimizer(members, config, groups, sorted(buckets, key=last.__getitem__), rule_of=rule_of, rules=names)


def _param_groups(chosen: list[tuple[AssignmentRow, torch.nn.Parameter]], cfg: RunConfig) -> list[dict[str, Any]]:
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
    kind: str,
    expert: bool,
    param_groups: list[dict[str, Any]],
    pieces: list[Piece],
    config: OptimizerConfig,
    cfg: RunConfig,
    groups: ProcessGroupCollection,
) -> ShardedOptimizer:
    optim, options = cfg.optim, normuon_options(cfg.optim)
    stack_bytes = None if optim.normuon_stack_mib is None else optim.normuon_stack_mib * 2**20
    if kind == "normuon":
        split_over = None if expert else groups.tp  # an expert is never split
        build = partial(NorMuon, lr=optim.lr, options=options, stack_bytes=stack_bytes, tp_group=split_over)
        initialize = _initialize_normuon_state
    else:
        # Fused: one kernel over all tensors on CUDA, one C++ loop on a CPU.
        betas = (optim.adam_beta1, optim.adam_beta2)
        build = partial(torch.optim.AdamW, lr=0.0, betas=betas, eps=optim.adam_eps, weight_decay=0.0, fused=True)
        initialize = _initialize_adamw_state
    return ShardedOptimizer(
        param_groups,
        build,
        initialize,
        config,
        pieces=pieces,
        # An expert is never split, so that each rank's gradients of experts count.
        tp_group=groups.expt_tp if expert else groups.tp,
        expert=expert,
        gathers_rows=kind == "normuon",
    )


def _initialize_normuon_state(optimizer: torch.optim.Optimizer) -> None:
    assert isinstance(optimizer, NorMuon)
    optimizer.initialize_state()


def _initialize_adamw_state(optimizer: torch.optim.Optimizer) -> None:
    """Zero state for every parameter that has none, as the first step would create."""
    for param in (param for group in optimizer.param_groups for param in group["params"]):
        if not (state := optimizer.state[param]):
            state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(param), torch.zeros_like(param)


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
