"""NorMuon: orthogonalised momentum with a per-row second moment, for stacks of equally shaped matrices.

Per matrix (NorMuon, arXiv 2510.05491; Polar Express, arXiv 2505.16932):

    m <- lerp(m, g, 1 - beta);  u = lerp(g, m, beta)                      Nesterov
    u <- polar_express(u)
    v <- lerp(v, mean(u^2 over the columns), 1 - beta2)                    one value per output row
    u <- u / sqrt(v + eps), rescaled to the Frobenius norm it had before
    w <- w (1 - lr wd) - lr sqrt(max(1, out / in)) u

Shapes: N matrices in a stack, R rows (out), C columns (in), E experts of a parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist

from megatron_vpmoe.config.memory import FILL_FLOPS, STACK_BYTES
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.optim.active_matrices import active_matrices, by_piece
from megatron_vpmoe.optim.matrix_layout import MatrixLayout, layout_flops, matrix_layout
from megatron_vpmoe.optim.matrix_stacks import Member, Stack, plan_stacks
from megatron_vpmoe.optim.polar_express import Workspace, compute_dtype, polar_express
from megatron_vpmoe.optim.split_matrices import Split

Moved = Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], None]
"""Takes pieces and what is added to them, or to a part of each; those tensors do not last."""


@dataclass(frozen=True)
class NorMuonOptions:
    """The numbers of the formulas, and how they are computed."""

    momentum: float = 0.95
    """Beta of the Nesterov momentum."""
    beta2: float = 0.95
    """Decay of the row statistic."""
    eps: float = 1e-10
    """Added to the row statistic before the root."""
    steps: int = 5
    """Polar Express iterations, 1 to 5."""
    safety: float = 2e-2
    """Polar Express headroom on the norm."""
    compute_dtype: torch.dtype | None = None
    """Polar Express in this dtype; None: bf16 on CUDA, fp32 on CPU."""
    momentum_dtype: torch.dtype | None = None
    """The momentum is kept in this dtype; None: the parameter's (fp32)."""
    idle_expert_policy: Literal["skip", "step"] = "skip"
    """What happens to an expert without tokens."""


def row_factors(
    update_NRC: torch.Tensor,
    second_moment_NR1: torch.Tensor,
    active_N11: torch.Tensor | None = None,
    *,
    beta2: float,
    eps: float,
    scale: float = 1.0,
    split: Split | None = None,
) -> torch.Tensor:
    """What each row of the orthogonalised update is multiplied by: row normalisation, restored norm and scale in one.

    Args:
        update_NRC: from ``polar_express``.
        second_moment_NR1: the row statistic, fp32 (fp64 for fp64 parameters); advanced in place.
        active_N11: 1 for matrices that take part, 0 for those whose update is zero and whose statistic stays.
        beta2: decay of the row statistic.
        eps: added to it before the root.
        scale: a further factor.
        split: tensor-parallel ranks hold parts of these matrices; the statistic is of whole rows, the norm of whole
            matrices.

    Returns:
        [N, R, 1] in the dtype of the statistic.
    """
    rows, cols = update_NRC.shape[1:]
    dtype = second_moment_NR1.dtype
    norm_NR1 = torch.linalg.vector_norm(update_NRC, dim=2, keepdim=True, dtype=dtype)
    power_NR1 = norm_NR1.square()
    if split is not None and split.dim == 1:
        power_NR1, cols = split.sum(power_NR1), cols * split.group.size()
        norm_NR1 = power_NR1.sqrt()
    weight = 1.0 - beta2 if active_N11 is None else (1.0 - beta2) * active_N11
    second_moment_NR1.lerp_(power_NR1.div_(cols), weight)
    factor_NR1 = (second_moment_NR1 + eps).rsqrt_()
    # The rescaling needs only the row norms, so the matrix itself is touched once. Zero matrices give 0 / tiny = 0.
    normed_N11, whole_N11 = (
        torch.linalg.vector_norm(norms, dim=1, keepdim=True) for norms in (norm_NR1 * factor_NR1, norm_NR1)
    )
    if split is not None and split.dim == 0:
        normed_N11, whole_N11 = split.sum(torch.stack([normed_N11, whole_N11]).square_()).sqrt_().unbind()
        rows *= split.group.size()
    scale *= max(1.0, rows / cols) ** 0.5
    factor_NR1 *= whole_N11.div_(torch.rsub(normed_N11, torch.finfo(dtype).tiny, alpha=-1.0 / scale))
    return factor_NR1 if active_N11 is None else factor_NR1.mul_(active_N11)


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
        options: the formulas' numbers.
        stack_bytes: size of the largest stack, by default ``STACK_BYTES``: few launches on a
            GPU, what the caches hold on a CPU; two to five times as much is in use.
        tp_group: the ranks that hold parts of the parameters which Megatron marks as ``tensor_model_parallel``; every
            ``step`` is a collective of them then.

    Raises:
        ConfigError: a parameter that holds no matrices, or is not fp32 (fp64).
    """

    def __init__(
        self,
        params: Any,
        lr: float,
        weight_decay: float = 0.0,
        *,
        options: NorMuonOptions = NorMuonOptions(),
        stack_bytes: int | None = None,
        tp_group: dist.ProcessGroup | None = None,
    ) -> None:
        self._tp_group = tp_group if tp_group is not None and tp_group.size() > 1 else None
        self._layouts: list[list[MatrixLayout]] = []
        self._plans: dict[tuple[tuple[int, int], ...], list[Stack]] = {}
        self._options = options
        self._stack_bytes = stack_bytes
        self._workspace = Workspace()
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group and read the layout of its parameters."""
        super().add_param_group(param_group)
        self._layouts.append(
            [
                matrix_layout(param, tensor_parallel=self._tp_group is not None)
                for param in self.param_groups[-1]["params"]
            ]
        )
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
                momentum = torch.zeros(
                    param.shape, dtype=self._options.momentum_dtype or param.dtype, device=param.device
                )
                self.state[param]["momentum_buffer"] = momentum
                self.state[param]["second_moment"] = param.new_zeros((*param.shape[:-1], 1), requires_grad=False)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """torch's, which casts every state tensor to its parameter's dtype; the momentum goes back to its own."""
        super().load_state_dict(state_dict)
        if self._options.momentum_dtype is not None:
            for state in self.state.values():
                state["momentum_buffer"] = state["momentum_buffer"].to(self._options.momentum_dtype)

    @torch.no_grad()
    def step(  # type: ignore[override]
        self,
        closure: Callable[[], float] | None = None,
        *,
        stepped: Callable[[list[tuple[torch.Tensor, int]]], None] = lambda _: None,
        moved: Moved | None = None,
    ) -> None:
        """Update every parameter that has a gradient.

        Args:
            closure: refused; gradients are ready when Megatron's optimizer calls this.
            stepped: called after each stack with the parameters it had part of, and how many of their elements.
            moved: told of each stack what is added to which parameters; None: that is not written down.
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
        leaves = [self.param_groups[g]["params"][i] for g, i in places]
        layouts = [self._layouts[g][i] for g, i in places]
        momenta, second_moments = ([self.state[p][of] for p in leaves] for of in ("momentum_buffer", "second_moment"))
        params, grads, momenta, second_moments = (
            [layout.unfused(x) for layout, x in zip(layouts, tensors, strict=True)]
            for tensors in (leaves, [p.grad for p in leaves], momenta, second_moments)
        )
        for stack in self._stacks(places, params, layouts):
            self._step_stack(stack, leaves, params, grads, momenta, second_moments, moved)
            stepped([(leaves[segment.index], segment.in_param(params).numel()) for segment in stack.segments])
        if any(leaf.is_cuda for leaf in leaves):
            self._workspace = Workspace()  # its memory goes to the next forward pass: there fresh buffers cost nothing

    def _step_stack(
        self,
        stack: Stack,
        leaves: Sequence[torch.Tensor],
        params: Sequence[torch.Tensor],
        grads: Sequence[torch.Tensor],
        momenta: Sequence[torch.Tensor],
        second_moments: Sequence[torch.Tensor],
        moved: Moved | None,
    ) -> None:
        """Update the matrices of ``stack`` and their state in place; the lists are those that its segments index.

        ``leaves`` are what ``params`` are views of, for ``moved``.
        """
        options, split, workspace = self._options, self._split(stack), self._workspace
        lr, weight_decay = (self.param_groups[stack.group][name] for name in ("lr", "weight_decay"))
        dtype = params[stack.segments[0].index].dtype
        second_moment_NR1, (grads, advanced, matrices) = stack.take(second_moments, (grads, momenta, params), dtype)
        active_N11 = active_matrices(grads) if stack.routed and options.idle_expert_policy == "skip" else None
        nesterov_NRC = workspace.take("nesterov", (stack.count, stack.rows, stack.cols), dtype, grads[0].device)
        weights, targets = by_piece(stack, 1.0 - options.momentum, active_N11), stack.cut(nesterov_NRC)
        for grad, momentum, weight, target in zip(grads, advanced, weights, targets, strict=True):
            torch.lerp(grad, momentum.lerp_(grad, weight), options.momentum, out=target)
        orthogonalise = partial(
            polar_express, steps=options.steps, safety=options.safety, dtype=options.compute_dtype, workspace=workspace
        )
        update_NRC = orthogonalise(nesterov_NRC) if split is None else split.apply_whole(nesterov_NRC, orthogonalise)
        # w (1 - lr decay) - lr u is w on the way to -u / decay, by lr decay of it: one pass over w.
        share, scale = (lr * weight_decay, -1.0 / weight_decay) if weight_decay else (lr, -1.0)
        factor_NR1 = row_factors(
            update_NRC, second_moment_NR1, active_N11, beta2=options.beta2, eps=options.eps, scale=scale, split=split
        )
        torch.mul(update_NRC, factor_NR1, out=nesterov_NRC)  # the targets now
        parts = by_piece(stack, share, active_N11)
        if moved is not None:  # written over the update, which has been used
            for matrix, part, target, change in zip(matrices, parts, targets, stack.cut(update_NRC), strict=True):
                torch.sub(target, matrix, out=change).mul_(part) if weight_decay else torch.mul(target, lr, out=change)
            moved([leaves[segment.index] for segment in stack.segments], stack.slots(update_NRC))
        for matrix, part, target in zip(matrices, parts, targets, strict=True):
            matrix.lerp_(target, part) if weight_decay else matrix.add_(target, alpha=lr)
        stack.put(second_moments, second_moment_NR1, ((momenta, advanced), (params, matrices)))

    def flops(self) -> int:
        """Of Polar Express in one step of this rank, no expert left out."""
        ranks = 1 if self._tp_group is None else self._tp_group.size()
        held = zip(self.param_groups, self._layouts, strict=True)
        return sum(
            layout_flops(layout, param.shape, self._dtype(param), self._options.steps, ranks)
            for group, layouts in held
            for param, layout in zip(group["params"], layouts, strict=True)
        )

    def _dtype(self, param: torch.Tensor) -> torch.dtype:
        return self._options.compute_dtype or compute_dtype(param.device.type)

    def _split(self, stack: Stack) -> Split | None:
        if stack.split is None:
            return None
        return Split(stack.split, cast(dist.ProcessGroup, self._tp_group))

    def _stacks(
        self, places: tuple[tuple[int, int], ...], params: Sequence[torch.Tensor], layouts: Sequence[MatrixLayout]
    ) -> list[Stack]:
        """The plan over the (unfused) parameters at (group, index); made once for each set of them."""
        if places not in self._plans:
            members = [Member(p.shape, layout, g) for p, layout, (g, _) in zip(params, layouts, places, strict=True)]
            size, device = (
                max((p.element_size() for p in params), default=1),
                params[0].device.type if params else "cpu",
            )
            stack, fill = self._stack_bytes or STACK_BYTES[device], FILL_FLOPS[device]
            self._plans[places] = plan_stacks(members, stack_bytes=stack, fill_flops=fill, element_size=size)
        return self._plans[places]
