"""NorMuon: orthogonalised momentum with a per-row second moment, for stacks of equally shaped matrices.

Per matrix (NorMuon, arXiv 2510.05491; Polar Express, arXiv 2505.16932):

    m <- lerp(m, g, 1 - beta);  u = lerp(g, m, beta)                      Nesterov
    u <- polar_express(u)
    v <- lerp(v, mean(u^2 over the columns), 1 - beta2)                    one value per output row
    u <- u / sqrt(v + eps), rescaled to the Frobenius norm it had before
    w <- w (1 - lr wd) - lr sqrt(max(1, out / in)) u

Shapes: N matrices in a stack, R rows (out), C columns (in), E experts of a parameter.
"""

# torch._foreach_*: one call (one launch on a GPU) over a list of tensors; torch does not export the names to checkers.
# pyright: reportPrivateImportUsage=false

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.optim.matrix_stacks import MatrixLayout, Member, Stack, matrix_layout, plan_stacks
from megatron_vpmoe.optim.polar_express import polar_express

IDLE_EXPERT_POLICIES = ("skip", "step")
STACK_BYTES = {"cuda": 256 * 2**20, "cpu": 2**20}
"""Largest stack per device: few launches on a GPU, what the caches hold on a CPU."""


def normalized_update(
    nesterov_NRC: torch.Tensor,
    second_moment_NR1: torch.Tensor,
    active_N11: torch.Tensor | None = None,
    *,
    beta2: float,
    eps: float,
    steps: int,
    safety: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Orthogonalise, normalise the rows, restore the norm and scale: everything after the momentum, as a pure function.

    Args:
        nesterov_NRC: momentum with look-ahead.
        second_moment_NR1: the row statistic before this step, fp32 (fp64 for fp64 inputs).
        active_N11: 1 for matrices that take part, 0 for those whose update is zero and whose statistic stays.
        beta2: decay of the row statistic.
        eps: added to it before the root.
        steps: Polar Express iterations.
        safety: Polar Express headroom.

    Returns:
        update [N, R, C] (to be multiplied by -lr) and the new row statistic [N, R, 1].
    """
    rows, cols = nesterov_NRC.shape[1:]
    update_NRC = polar_express(nesterov_NRC, steps=steps, safety=safety)
    dtype = second_moment_NR1.dtype
    power_NR1 = torch.linalg.vector_norm(update_NRC, dim=2, keepdim=True, dtype=dtype).square_()
    weight = 1.0 - beta2 if active_N11 is None else (1.0 - beta2) * active_N11
    second_moment_NR1 = torch.lerp(second_moment_NR1, power_NR1 / cols, weight)
    inverse_NR1 = (second_moment_NR1 + eps).reciprocal_()
    # The rescaling needs only the row norms, so the matrix itself is touched once. Zero matrices give 0 / tiny = 0.
    normed_N11 = (power_NR1 * inverse_NR1).sum(dim=1, keepdim=True).clamp_min_(torch.finfo(dtype).tiny)
    factor_NR1 = inverse_NR1.sqrt_() * (power_NR1.sum(dim=1, keepdim=True) / normed_N11).sqrt_()
    factor_NR1 *= max(1.0, rows / cols) ** 0.5
    if active_N11 is not None:
        factor_NR1 *= active_N11
    in_place = update_NRC.dtype == dtype
    return (update_NRC.mul_(factor_NR1) if in_place else update_NRC * factor_NR1), second_moment_NR1


def active_experts(grad: torch.Tensor) -> torch.Tensor:
    """1.0 where any element of a matrix's gradient differs from zero (or is NaN), else 0.0.

    Args:
        grad: [E, out, in], or [out, in] for an expert that is a parameter of its own.

    Returns:
        [E, 1, 1] or [1, 1], the dtype of ``grad``.
    """
    # Two reductions without a temporary; a norm would be slower (inf) or underflow to zero (2).
    largest, smallest = grad.amax((-2, -1), keepdim=True), grad.amin((-2, -1), keepdim=True)
    return ((largest != 0) | (smallest != 0)).to(grad.dtype)


class NorMuon(torch.optim.Optimizer):
    """NorMuon over fp32 (or fp64) parameters: hidden matrices and expert stacks.

    The logical matrices are read when a parameter is added (``matrix_rows`` on fused weights, 3-D parameters, else the
    whole): a master copy that later takes the parameter's place keeps its layout. State per parameter:
    ``momentum_buffer`` (its shape) and ``second_moment`` (its shape with a last dimension of 1).

    A routed expert whose gradient is exactly zero everywhere saw no token. Policy ``skip`` leaves its weights, momentum
    and statistic untouched, so that stale momentum cannot move it by a full-size step (an orthogonalised update has the
    same size however small the momentum has become); ``step`` treats it like any other matrix.

    Gradients must be finite: a NaN would spread into the momentum for good. ``build_optimizer``'s optimizer refuses the
    step before it reaches this class.

    Args:
        params: parameters or groups.
        lr: learning rate.
        weight_decay: decoupled; w is multiplied by 1 - lr * weight_decay.
        momentum: beta of the momentum.
        beta2: decay of the row statistic.
        eps: added to the row statistic.
        polar_express_steps: iterations, 1 to 5.
        polar_express_safety: headroom on the norm.
        idle_expert_policy: ``skip`` or ``step``.
        stack_bytes: size of the largest stack, by default ``STACK_BYTES``; about four times as much is held at once.

    Raises:
        ConfigError: an unknown policy, or a parameter that holds no matrices.
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        *,
        momentum: float = 0.95,
        beta2: float = 0.95,
        eps: float = 1e-10,
        polar_express_steps: int = 5,
        polar_express_safety: float = 2e-2,
        idle_expert_policy: str = "skip",
        stack_bytes: int | None = None,
    ) -> None:
        if idle_expert_policy not in IDLE_EXPERT_POLICIES:
            raise ConfigError(
                f"normuon_idle_expert_policy is {idle_expert_policy!r}", remedy=f"one of {IDLE_EXPERT_POLICIES}"
            )
        self._layouts: list[list[MatrixLayout]] = []
        self._plans: dict[tuple[tuple[int, int], ...], list[Stack]] = {}
        self._momentum = momentum
        self._update_options = {
            "beta2": beta2, "eps": eps, "steps": polar_express_steps, "safety": polar_express_safety
        }  # fmt: skip
        self._skip_idle = idle_expert_policy == "skip"
        self._stack_bytes = stack_bytes
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and read the layout of its parameters."""
        super().add_param_group(param_group)
        self._layouts.append([matrix_layout(param) for param in self.param_groups[-1]["params"]])
        self._plans.clear()

    def initialize_state(self) -> None:
        """Create zero state for every parameter that has none."""
        for group in self.param_groups:
            for param in group["params"]:
                if self.state[param]:
                    continue
                if param.dtype not in (torch.float32, torch.float64):
                    raise ConfigError(
                        f"NorMuon was given a parameter in {param.dtype}",
                        remedy="keep fp32 master weights (Float16OptimizerWithFloat16Params)",
                    )
                self.state[param]["momentum_buffer"] = torch.zeros_like(param, memory_format=torch.contiguous_format)
                self.state[param]["second_moment"] = param.new_zeros((*param.shape[:-1], 1), requires_grad=False)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient.

        Args:
            closure: refused; gradients are ready when Megatron's optimizer calls this.
        """
        if closure is not None:
            raise ValueError("NorMuon takes no closure")
        self.initialize_state()
        places = tuple(
            (g, i)
            for g, group in enumerate(self.param_groups)
            for i, p in enumerate(group["params"])
            if p.grad is not None
        )
        if not places:
            return
        params = [self.param_groups[g]["params"][i] for g, i in places]
        stacks = self._plans.get(places)
        if stacks is None:
            members = [Member(p.shape, self._layouts[g][i], g) for p, (g, i) in zip(params, places, strict=True)]
            element_size = max(p.element_size() for p in params)
            stack_bytes = self._stack_bytes or STACK_BYTES[params[0].device.type]
            stacks = plan_stacks(members, stack_bytes=stack_bytes, element_size=element_size)
            self._plans[places] = stacks
        routed = [self._skip_idle and self._layouts[g][i].routed for g, i in places]
        normuon_step(
            params,
            [p.grad for p in params],
            [self.state[p]["momentum_buffer"] for p in params],
            [self.state[p]["second_moment"] for p in params],
            active=[active_experts(p.grad) if r else None for p, r in zip(params, routed, strict=True)],
            stacks=stacks,
            group_lrs=[group["lr"] for group in self.param_groups],
            decays=[self.param_groups[g]["lr"] * self.param_groups[g]["weight_decay"] for g, _ in places],
            momentum=self._momentum,
            **self._update_options,
        )


def normuon_step(
    params: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
    momenta: Sequence[torch.Tensor],
    second_moments: Sequence[torch.Tensor],
    *,
    active: Sequence[torch.Tensor | None],
    stacks: Sequence[Stack],
    group_lrs: Sequence[float],
    decays: Sequence[float],
    momentum: float,
    **update_options: Any,
) -> None:
    """One step over all stacks; ``params``, ``momenta`` and ``second_moments`` are updated in place.

    Args:
        params: fp32 parameters, [out, in] or [E, out, in].
        grads: their gradients.
        momenta: their momentum.
        second_moments: their row statistic, last dimension 1.
        active: per parameter None, or ``active_experts`` of its gradient.
        stacks: the plan over exactly these parameters.
        group_lrs: learning rate of each ``Stack.group``.
        decays: per parameter, lr * weight_decay.
        momentum: beta.
        update_options: the keyword arguments of ``normalized_update``.
    """
    dense = [i for i, mask in enumerate(active) if mask is None]
    if dense:
        torch._foreach_lerp_([momenta[i] for i in dense], [grads[i] for i in dense], 1.0 - momentum)
        torch._foreach_mul_([params[i] for i in dense], [1.0 - decays[i] for i in dense])
    for i, mask in enumerate(active):
        if mask is not None:
            momenta[i].lerp_(grads[i], mask * (1.0 - momentum))
            params[i].mul_(1.0 - decays[i] * mask)
    for stack in stacks:
        like = params[stack.segments[0].index]
        # Nesterov's look-ahead is formed in the stack itself: copy g, then lerp towards m.
        nesterov_NRC = like.new_empty((stack.count, stack.rows, stack.cols))
        slots = [segment.in_stack(nesterov_NRC) for segment in stack.segments]
        torch._foreach_copy_(slots, [segment.in_param(grads) for segment in stack.segments])
        torch._foreach_lerp_(slots, [segment.in_param(momenta) for segment in stack.segments], momentum)
        statistic_NR1 = like.new_empty((stack.count, stack.rows, 1))
        statistics = [segment.in_param(second_moments) for segment in stack.segments]
        torch._foreach_copy_([segment.in_stack(statistic_NR1) for segment in stack.segments], statistics)
        update_NRC, statistic_NR1 = normalized_update(
            nesterov_NRC, statistic_NR1, _stack_activity(stack, active, like), **update_options
        )
        torch._foreach_copy_(statistics, [segment.in_stack(statistic_NR1) for segment in stack.segments])
        torch._foreach_add_(
            [segment.in_param(params) for segment in stack.segments],
            [segment.in_stack(update_NRC) for segment in stack.segments],
            alpha=-group_lrs[stack.group],
        )


def _stack_activity(stack: Stack, active: Sequence[torch.Tensor | None], like: torch.Tensor) -> torch.Tensor | None:
    """[N, 1, 1] activity of a stack's matrices, or None when none of them is routed."""
    if all(active[segment.index] is None for segment in stack.segments):
        return None
    activity_N11 = like.new_ones((stack.count, 1, 1))
    for segment in stack.segments:
        mask = active[segment.index]
        if mask is not None and segment.row is None:
            activity_N11[segment.slot : segment.slot + segment.length] = mask.narrow(0, segment.start, segment.length)
        elif mask is not None:
            activity_N11[segment.slot] = mask
    return activity_N11
