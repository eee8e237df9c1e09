"""Forward and backward of the loss over a large vocabulary: in chunks of tokens, against plain PyTorch.

"plain" projects every position and takes torch's cross-entropy of the fp32 logits, weighted by the loss mask.
"plain, supervised" projects the supervised positions only. Both make the gradients of hidden states and projection.

Every round runs each side once, in an order that rotates, and forms the ratios within the round. Memory is the peak
over what was there before (peak_memory.py).

    python scripts/bench/cross_entropy.py --hidden 1024 --supervised 60
    python scripts/bench/cross_entropy.py --hidden 128 --supervised 100 --bf16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peak_memory import PeakMemory
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.model.cross_entropy import weighted_cross_entropy
from megatron_vpmoe.runtime.device import current_device

Side = Callable[[], Tensor]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=201_088)
    parser.add_argument("--supervised", type=float, default=100.0, help="supervised positions, percent")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def sides(args: argparse.Namespace) -> tuple[dict[str, Side], tuple[Tensor, Tensor]]:
    """The ways to compute one loss, and the leaves that they differentiate by."""
    device, dtype = current_device(), torch.bfloat16 if args.bf16 else torch.float32
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype).requires_grad_()
    projection = (0.02 * torch.randn(args.vocab, args.hidden, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(0, args.vocab, (args.tokens,), device=device)
    # Answers stand at the end of conversations: supervised positions are contiguous, here one stretch.
    mask = torch.arange(args.tokens, device=device) >= args.tokens - round(args.tokens * args.supervised / 100)
    weight = torch.rand(args.tokens, device=device) / args.tokens

    def plain() -> Tensor:
        losses = functional.cross_entropy(functional.linear(hidden, projection).float(), labels, reduction="none")
        return (losses * (weight * mask)).sum()

    def plain_supervised() -> Tensor:
        logits = functional.linear(hidden[mask], projection).float()
        return (functional.cross_entropy(logits, labels[mask], reduction="none") * weight[mask]).sum()

    def chunked() -> Tensor:
        return weighted_cross_entropy(hidden[mask], projection, labels[mask], weight[mask])[0]

    both = {"chunked": chunked, "plain": plain}
    return (both if args.supervised == 100 else {**both, "plain, supervised": plain_supervised}), (hidden, projection)


def run(side: Side, leaves: tuple[Tensor, ...]) -> tuple[float, float, float, list[Tensor]]:
    """Seconds, GiB at the peak over the start, the loss and its gradients."""
    for leaf in leaves:
        leaf.grad = None
    on_gpu = leaves[0].is_cuda
    memory = PeakMemory(leaves[0].device)
    begin = time.perf_counter()
    loss = side()
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - begin
    peak = memory.over_start()
    return seconds, peak / 2**30, float(loss.detach()), [x.grad for x in leaves if x.grad is not None]


def main() -> None:
    """Time all sides, compare their results, print the ratios."""
    args = arguments()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    functions, leaves = sides(args)
    taken: dict[str, list[tuple[float, float]]] = {name: [] for name in functions}
    results: dict[str, tuple[float, list[Tensor]]] = {}
    for round_number in range(-1, args.rounds):  # one round to warm up, which also compares the results
        names = list(functions)
        first = round_number % len(names)
        for name in names[first:] + names[:first]:
            seconds, peak, loss, gradients = run(functions[name], leaves)
            if round_number >= 0:
                taken[name].append((seconds, peak))
            elif not results:
                results[name] = loss, gradients
            else:
                (other_loss, other_gradients), *_ = results.values()
                apart = [float((a - b).norm() / b.norm()) for a, b in zip(gradients, other_gradients, strict=True)]
                print(
                    f"{name} against {next(iter(results))}: loss {abs(loss - other_loss):.1e} apart, gradients {apart}"
                )
            del gradients
        results.clear()

    print(
        f"{args.tokens} tokens x {args.vocab}, hidden {args.hidden}, {args.supervised:g} % supervised, "
        f"{leaves[0].dtype}, {leaves[0].device}, {args.threads} threads, {args.rounds} rounds"
    )
    print(f"{'forward + backward':20s} {'median s':>9s} {'peak GiB':>9s}   time over chunked: min / median / max")
    for name, runs in taken.items():
        ratios = sorted(other[0] / mine[0] for other, mine in zip(runs, taken["chunked"], strict=True))
        summary = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
        seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:20s} {seconds:9.2f} {peak:9.2f}   {summary}")


if __name__ == "__main__":
    main()
