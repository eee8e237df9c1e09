"""The selective scan of S6 (Gu and Dao 2023, arXiv 2312.00752, section 3): a linear recurrence whose decay, input and
output depend on the token.

    h_t = exp(step_t A) h_(t-1) + step_t B_t x_t        y_t = C_t h_t        (of every channel alone)

All rows of a batch are one sequence: the first token of each document takes nothing from before. Two forms of one
computation, in chunks: forward keeps the state before each chunk alone, and backward makes a chunk's states again.

- fp32 on a CPU: a kernel that holds a few channels of a chunk in registers (`scan_kernel`).
- elsewhere, and in fp64: torch's operations here. Chunks go through their steps side by side, from nothing; then what
  each takes over from the one before is added, decayed by the product of its steps' decays. No logarithms or inverse
  products: a decay that underflows stays right.

Shapes: T positions of all rows, D channels, N numbers of state a channel, K chunks, L steps of one.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from megatron_vpmoe.think.scan_kernel import KernelScan

_STEPS = 16
"""L."""

_SIDE_BY_SIDE = {"cpu": 2, "cuda": 64}
"""Chunks at once: on a CPU as many as its cache holds, on a GPU enough to fill it."""


KERNEL, CHUNKS = "by a compiled kernel", "in chunks by torch"


def scan_form(device_type: str, dtype: torch.dtype) -> str:
    """Which of the two forms a device takes for this dtype."""
    return KERNEL if device_type == "cpu" and dtype == torch.float32 else CHUNKS


def selective_scan(
    step_TD: Tensor, x_TD: Tensor, a_ND: Tensor, b_TN: Tensor, c_TN: Tensor, begins_T: Tensor
) -> tuple[Tensor, Tensor]:
    """The recurrence over a sequence of documents.

    Args:
        step_TD: positive, fp32 or fp64 as all others.
        x_TD: what enters.
        a_ND: A, negative.
        b_TN: B.
        c_TN: C.
        begins_T: bool, the first position of each document, where the state starts from zero.

    Returns:
        y [T, D], differentiable once; the state behind the last position [N, D], without a gradient.
    """
    # An infinite step decays everything; the step that lets x in stays as it is.
    decay_TD = step_TD.detach().masked_fill(begins_T[:, None], torch.inf)
    form: Any = KernelScan if scan_form(x_TD.device.type, x_TD.dtype) == KERNEL else ChunkedScan
    return form.apply(decay_TD, *(each.contiguous() for each in (step_TD, x_TD, a_ND, b_TN, c_TN)))


class ChunkedScan(Function):
    """The recurrence by torch's operations; arguments as in ``selective_scan``, after the step of the decay alone."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, decay_TD: Tensor, step_TD: Tensor, x_TD: Tensor, a_ND: Tensor, b_TN: Tensor, c_TN: Tensor
    ) -> tuple[Tensor, Tensor]:
        y_TD, entering_TD, state_ND = torch.empty_like(x_TD), step_TD * x_TD, torch.zeros_like(a_ND)
        starts = []
        for part in _parts(x_TD):
            starts.append(state_ND)
            decay_KND = _decays(decay_TD[part], a_ND)
            h_KND = entering_TD[part, None] * b_TN[part, :, None]
            state_ND = _spread(decay_KND, h_KND, state_ND)
            y_TD[part] = (h_KND * c_TN[part, :, None]).sum(1)
        ctx.save_for_backward(decay_TD, step_TD, x_TD, a_ND, b_TN, c_TN, torch.stack(starts))
        ctx.mark_non_differentiable(state_ND)
        return y_TD, state_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor, _state: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        decay_TD, step_TD, x_TD, a_ND, b_TN, c_TN, starts = ctx.saved_tensors
        entering_TD = step_TD * x_TD
        of_step, of_entering, of_a = torch.empty_like(x_TD), torch.empty_like(x_TD), torch.zeros_like(a_ND)
        of_b, of_c = torch.empty_like(b_TN), torch.empty_like(c_TN)
        of_state, next_decay = torch.zeros_like(a_ND), torch.zeros_like(a_ND)
        for start_ND, part in reversed([*zip(starts, _parts(x_TD), strict=True)]):
            decay = _decays(decay_TD[part], a_ND)
            h = entering_TD[part, None] * b_TN[part, :, None]
            _spread(decay, h, start_ND)
            of_c[part] = (h * grad_TD[part, None]).sum(2)
            # The gradient of h_t is that of y_t, and that of h_(t+1) decayed: the same recurrence from the end.
            of_h = grad_TD[part, None] * c_TN[part, :, None]
            of_state = _spread(torch.cat([decay[1:], next_decay[None]]), of_h, of_state, from_end=True)
            next_decay = decay[0].clone()
            of_entering[part] = (of_h * b_TN[part, :, None]).sum(1)
            of_b[part] = (of_h * entering_TD[part, None]).sum(2)
            of_exponent = of_h.mul_(decay).mul_(torch.cat([start_ND[None], h[:-1]]))
            of_step[part] = (of_exponent * a_ND).sum(1)
            of_a += (of_exponent * step_TD[part, None]).sum(0)
        return None, of_step + of_entering * x_TD, of_entering * step_TD, of_a, of_b, of_c


def _parts(x_TD: Tensor) -> list[slice]:
    """The sequence in parts of as many chunks as go side by side; what is left of a chunk is a part of its own."""
    length, size = len(x_TD), _STEPS * _SIDE_BY_SIDE[x_TD.device.type]
    whole = length - length % _STEPS
    parts = [slice(begin, min(begin + size, whole)) for begin in range(0, whole, size)]
    return [*parts, slice(whole, length)] if whole < length else parts


def _decays(step_TD: Tensor, a_ND: Tensor) -> Tensor:
    return torch.mul(step_TD[:, None], a_ND).exp_()


def _spread(decay: Tensor, value: Tensor, start_ND: Tensor, *, from_end: bool = False) -> Tensor:
    """value_t += decay_t value_(t-1), in place, over [T, N, D], from ``start_ND`` on; returns the last.

    Args:
        from_end: time runs backwards.
    """
    length = len(value)
    shape = (length // _STEPS, _STEPS) if length >= _STEPS else (1, length)
    decay, value = decay.unflatten(0, shape), value.unflatten(0, shape)
    chunks, steps = range(shape[0]), range(shape[1])
    if from_end:
        chunks, steps = chunks[::-1], steps[::-1]
    value[chunks[0], steps[0]].addcmul_(decay[chunks[0], steps[0]], start_ND)
    for before, now in pairwise(steps):
        value[:, now].addcmul_(decay[:, now], value[:, before])
    if len(chunks) > 1:
        product = torch.empty_like(decay)
        product[:, steps[0]] = decay[:, steps[0]]
        for before, now in pairwise(steps):
            torch.mul(product[:, before], decay[:, now], out=product[:, now])
        for before, now in pairwise(chunks):
            value[now].addcmul_(product[now], value[before, steps[-1]])
    return value[chunks[-1], steps[-1]].clone()
