"""The selective scan of a state space layer against its recurrence step by step in torch; rounds interleaved.

Both forms of the sequential one are timed: decays made step by step, and for all steps at once, which holds [S, N, D]
several times. Times are of one layer's scan, forward and with gradients, in fp32 on one thread; a ratio is of the same
round, against the faster of the two.

    python scripts/bench/scan.py --rounds 15 --rows 1 4
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from megatron_vpmoe.think.scan import ChunkedScan, selective_scan

Given = tuple[Tensor, ...]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--channels", type=int, default=768)
    parser.add_argument("--states", type=int, default=16)
    return parser.parse_args()


def step_by_step(step: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    h, out = x.new_zeros(len(x), *a.shape), []
    for step_t, x_t, b_t, c_t in zip(*(each.unbind(1) for each in (step, x, b, c)), strict=True):
        h = torch.addcmul((step_t * x_t)[:, None] * b_t[:, :, None], torch.exp(step_t[:, None] * a), h)
        out.append((h * c_t[:, :, None]).sum(1))
    return torch.stack(out, 1)


def decays_at_once(step: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    decay = torch.exp(step[:, :, None] * a)
    entering = (step * x)[:, :, None] * b[..., None]
    h, states = x.new_zeros(len(x), *a.shape), []
    for decay_t, entering_t in zip(decay.unbind(1), entering.unbind(1), strict=True):
        h = torch.addcmul(entering_t, decay_t, h)
        states.append(h)
    return torch.einsum("bsnd,bsn->bsd", torch.stack(states, 1), c)


def begins(x: Tensor) -> Tensor:
    first = torch.zeros(x.shape[:2], dtype=torch.bool)
    first[:, 0] = True
    return first.flatten()


def in_chunks(step: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    decay = step.detach().flatten(0, 1).masked_fill(begins(x)[:, None], torch.inf)
    step, b, c = (each.flatten(0, 1) for each in (step, b, c))
    return ChunkedScan.apply(decay, step, x.flatten(0, 1), a, b, c)[0].view_as(x)  # type: ignore[index]


def by_kernel(step: Tensor, x: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    step, b, c = (each.flatten(0, 1) for each in (step, b, c))
    return selective_scan(step, x.flatten(0, 1), a, b, c, begins(x))[0].view_as(x)


SEQUENTIAL = {"step by step": step_by_step, "decays at once": decays_at_once}
FORMS: dict[str, Callable[..., Tensor]] = {**SEQUENTIAL, "in chunks (torch)": in_chunks, "kernel": by_kernel}


def drawn(args: argparse.Namespace, rows: int, round_: int) -> Given:
    g = torch.Generator().manual_seed(round_)
    shape = rows, args.length
    step = torch.rand(*shape, args.channels, generator=g) * 0.1
    x = torch.randn(*shape, args.channels, generator=g)
    a = -torch.arange(1.0, args.states + 1)[:, None].repeat(1, args.channels)
    b, c = (torch.randn(*shape, args.states, generator=g) for _ in range(2))
    return tuple(each.requires_grad_() for each in (step, x, a, b, c))


def timed(form: Callable[..., Tensor], given: Given) -> tuple[float, float, list[Tensor]]:
    """Milliseconds forward, and with gradients; y and them."""
    began = time.perf_counter()
    y = form(*given)
    forward = time.perf_counter() - began
    gradients = torch.autograd.grad(y.square().sum(), given)
    return 1e3 * forward, 1e3 * (time.perf_counter() - began), [y.detach(), *gradients]


def spread(values: Sequence[float]) -> str:
    return f"{min(values):8.1f} / {statistics.median(values):.1f} / {max(values):.1f}"


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    for rows in args.rows:
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in FORMS}
        worst = 0.0
        for round_ in range(args.rounds + 1):
            given, found = drawn(args, rows, round_), {}
            for name, form in FORMS.items():
                forward, both, found[name] = timed(form, given)
                if round_:  # the first round warms up
                    times[name].append((forward, both))
            for name in FORMS.keys() - SEQUENTIAL.keys():
                pairs = zip(found[name], found["step by step"], strict=True)
                worst = max(worst, *(float((a - b).abs().max() / b.abs().max()) for a, b in pairs))
        print(f"{rows} x {args.length} x {args.channels}, {args.states} numbers of state; least / median / most")
        for place, what in enumerate(("forward", "with gradients")):
            fastest = [min(times[name][n][place] for name in SEQUENTIAL) for n in range(args.rounds)]
            for name in FORMS:
                own = [each[place] for each in times[name]]
                ratio = spread([best / mine for best, mine in zip(fastest, own, strict=True)])
                print(f"  {what:15}{name:19}{spread(own)} ms   x {ratio}")
        print(f"  largest difference of y and gradients, relative to the largest value: {worst:.1e}")


if __name__ == "__main__":
    main()
