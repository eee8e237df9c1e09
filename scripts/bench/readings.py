"""The readings of a model's output over a large vocabulary, forward and backward: in chunks, against plain PyTorch.

    cross_entropy        weighted cross-entropy
    log_probabilities    of labels, and entropies, with a gradient from upstream
    divergence           forward KL to a teacher's 64 ids with a bucket for the tail, mixed with cross-entropy
    topk_kd              the last one, in chunks, against cross-entropy in chunks

"plain" projects every position and calculates with the fp32 logits of all. "plain, supervised" projects the supervised
positions only. Both make the gradients of hidden states and projection.

Every round runs each side once, in an order that rotates, and forms the ratios within the round. With one thread on a
CPU the seconds are the processor's, which other work on the machine disturbs less. Memory is the peak over what was
there before (profiling/stopwatch.py).

    python scripts/bench/readings.py --hidden 1024 --supervised 60
    python scripts/bench/readings.py --reading divergence --hidden 128 --bf16
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.model.output import CrossEntropy, Divergence, Term, log_probabilities, weighted_sum
from megatron_vpmoe.profiling.stopwatch import PeakMemory
from megatron_vpmoe.runtime.device import current_device

READINGS = ("cross_entropy", "log_probabilities", "divergence", "topk_kd")
TEACHER_IDS = 64
Side = Callable[[], Tensor]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reading", choices=READINGS, action="append", help="default: all")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--vocab", type=int, default=201_088)
    parser.add_argument("--supervised", type=float, default=100.0, help="supervised positions, percent")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def sides(reading: str, args: argparse.Namespace) -> tuple[dict[str, Side], tuple[Tensor, Tensor]]:
    """The ways to compute one loss, and the leaves that they differentiate by."""
    device, dtype = current_device(), torch.bfloat16 if args.bf16 else torch.float32
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype).requires_grad_()
    projection = (0.02 * torch.randn(args.vocab, args.hidden, device=device)).to(dtype).requires_grad_()
    labels = torch.randint(0, args.vocab, (args.tokens,), device=device)
    # Answers stand at the end of conversations: supervised positions are contiguous, here one stretch.
    mask = torch.arange(args.tokens, device=device) >= args.tokens - round(args.tokens * args.supervised / 100)
    weight = torch.rand(args.tokens, device=device) / args.tokens
    ids = torch.stack([torch.randperm(args.vocab, device=device)[:TEACHER_IDS] for _ in range(args.tokens)])
    log_p = torch.randn(args.tokens, TEACHER_IDS, device=device).log_softmax(-1) - 0.2

    weight *= mask
    everywhere = torch.ones_like(mask)

    def upstream(log_q: Tensor, entropy: Tensor, kept: Tensor) -> Tensor:
        return (weight[kept] * (torch.exp(0.1 * log_q) + 0.01 * entropy)).sum()

    def of_logits(kept: Tensor) -> Tensor:
        logits, w = functional.linear(hidden[kept], projection).float(), weight[kept]
        if reading == "cross_entropy":
            return (functional.cross_entropy(logits, labels[kept], reduction="none") * w).sum()
        log_q = logits.log_softmax(-1)
        of_labels = log_q.gather(-1, labels[kept, None]).squeeze(-1)
        if reading == "log_probabilities":
            return upstream(of_labels, -(log_q.exp() * log_q).sum(-1), kept)
        of_ids, p = log_q.gather(-1, ids[kept]), log_p[kept].exp()
        p_tail, q_tail = 1 - p.sum(-1), 1 - of_ids.exp().sum(-1)
        kl = (p * (log_p[kept] - of_ids)).sum(-1) + p_tail * (p_tail / q_tail).log()
        return (w * (kl - of_labels)).sum()

    def chunked(reading: str = reading) -> Tensor:
        h, w = hidden[mask], weight[mask]
        if reading == "log_probabilities":
            log_q, entropy = log_probabilities(h, projection, labels[mask], entropy=True)
            assert entropy is not None
            return upstream(log_q, entropy, mask)
        terms: list[Term] = [CrossEntropy(labels=labels[mask], weight=w)]
        if reading == "divergence":
            terms.append(Divergence(teacher_ids=ids[mask], teacher_log_p=log_p[mask], weight=w))
        return weighted_sum(h, projection, terms)[0]

    if reading == "topk_kd":
        both = {"cross_entropy": lambda: chunked("cross_entropy"), "topk_kd": lambda: chunked("divergence")}
        return both, (hidden, projection)
    both = {"chunked": chunked, "plain": lambda: of_logits(everywhere)}
    supervised = {} if args.supervised == 100 else {"plain, supervised": lambda: of_logits(mask)}
    return {**both, **supervised}, (hidden, projection)


def run(side: Side, leaves: tuple[Tensor, ...]) -> tuple[float, float, float, list[Tensor]]:
    """Seconds, GiB at the peak over the start, the loss and its gradients."""
    for leaf in leaves:
        leaf.grad = None
    on_gpu = leaves[0].is_cuda
    memory = PeakMemory()
    clock = time.perf_counter if on_gpu or torch.get_num_threads() > 1 else time.process_time
    begin = clock()
    loss = side()
    loss.backward()
    if on_gpu:
        torch.cuda.synchronize()
    seconds = clock() - begin
    peak = memory.over_start()
    return seconds, peak / 2**30, float(loss.detach()), [x.grad for x in leaves if x.grad is not None]


def compare(reading: str, args: argparse.Namespace) -> None:
    """Time all sides, compare their results, print the ratios."""
    torch.manual_seed(0)
    functions, leaves = sides(reading, args)
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
            elif reading != "topk_kd":  # whose sides are two losses
                (other_loss, other_gradients), *_ = results.values()
                apart = [float((a - b).norm() / b.norm()) for a, b in zip(gradients, other_gradients, strict=True)]
                print(
                    f"{name} against {next(iter(results))}: loss {abs(loss - other_loss):.1e} apart, gradients {apart}"
                )
            del gradients
        results.clear()

    print(
        f"{reading}: {args.tokens} tokens x {args.vocab}, hidden {args.hidden}, {args.supervised:g} % supervised, "
        f"{leaves[0].dtype}, {leaves[0].device}, {args.threads} threads, {args.rounds} rounds"
    )
    first = next(iter(taken))
    print(f"{'forward + backward':20s} {'median s':>9s} {'peak GiB':>9s}   time over {first}: min / median / max")
    for name, runs in taken.items():
        ratios = sorted(other[0] / mine[0] for other, mine in zip(runs, taken[first], strict=True))
        summary = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
        seconds, peak = (statistics.median(column) for column in zip(*runs, strict=True))
        print(f"{name:20s} {seconds:9.2f} {peak:9.2f}   {summary}")


def main() -> None:
    """Every reading that was asked for."""
    args = arguments()
    torch.set_num_threads(args.threads)
    for reading in args.reading or READINGS:
        compare(reading, args)


if __name__ == "__main__":
    main()
