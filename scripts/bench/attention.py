"""Forward and backward of one layer's attention: the backend that `auto` picks against the others and Megatron-Core's.

Every round times each side once, in an order that rotates, and forms the ratios within the round: a machine that slows
down slows all sides. Our sides get packed documents and a sink; Megatron-Core's unfused attention knows no packing and
gets each row as one document. Memory is each side's peak over inputs and outputs of the others, in a pass of its own.

    python scripts/bench/attention.py --seq 2048 --heads 8 --groups 2 --dim 128 --window 128 --batch 1
    python scripts/bench/attention.py --seq 2048 --heads 8 --groups 2 --dim 128 --window 0 --batch 1   # a global layer

On a GPU, where `auto` picks flex, also against torch's flash kernel (causal, without sink, bias and window), with the
time of compilation apart, and the achieved rates against what a large matrix product and a copy reach on that card:

    python scripts/bench/attention.py --bf16 --seq 2048 8192 32768 --heads 8 --groups 2 --dim 128 --window 0 --batch 1
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from peak_memory import PeakMemory
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.device import current_device, prepare

prepare()

from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_vpmoe.model.attention.backends import core_attention, select_backend  # noqa: E402
from megatron_vpmoe.model.attention.grape import alibi_slopes  # noqa: E402
from megatron_vpmoe.model.attention.masks import SequenceLayout  # noqa: E402

Side = Callable[[], Tensor]


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--seq", type=int, nargs="+", default=[512])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--dim", type=int, default=32, help="head dimension")
    parser.add_argument("--window", type=int, default=32, help="0: a global layer, with GRAPE-A's bias")
    parser.add_argument("--documents", type=int, default=1, help="documents of equal length that a row packs")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def our_side(args: argparse.Namespace, backend: str, qkv: tuple[Tensor, ...], sink: Tensor) -> Side:
    """One of our backends; the masks are built anew in each call, as in the first layer of a step."""
    (seq, batch), device = qkv[0].shape[:2], qkv[0].device
    row = torch.arange(seq, device=device)
    each = -(-seq // args.documents)
    document, position = ((x).expand(batch, -1).contiguous() for x in ((row // each).int(), row % each))

    def run() -> Tensor:
        return core_attention(
            *(x.permute(1, 2, 0, 3) for x in qkv),
            layout=SequenceLayout(document, position),
            window=args.window or None,
            alibi_slopes_H=None if args.window else alibi_slopes(args.heads, device),
            sink_H=sink,
            softmax_scale=args.dim**-0.5,
            backend=backend,
        )

    return run


def megatron_side(args: argparse.Namespace, qkv: tuple[Tensor, ...]) -> Side:
    """Megatron-Core's unfused attention with its learnable softmax offset; in global layers it has no distance bias."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=args.heads * args.dim,
        num_attention_heads=args.heads,
        num_query_groups=args.groups,
        kv_channels=args.dim,
        attention_dropout=0.0,
        softmax_type="learnable",
        window_size=(args.window - 1, 0) if args.window else None,
        bf16=args.bf16,
        params_dtype=qkv[0].dtype,
        masked_softmax_fusion=False,
    )
    attention = DotProductAttention(config, 1, AttnMaskType.causal, "self").to(qkv[0].device)
    return lambda: attention(*qkv, None)


def flash_side(qkv: tuple[Tensor, ...]) -> Side:
    """Torch's flash attention: causal over the whole row."""

    def run() -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in qkv)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    return run


def seconds(side: Callable[[], object], device: torch.device) -> float:
    """One call, everything that it launched included."""
    _synchronize(device)
    begin = time.perf_counter()
    side()
    _synchronize(device)
    return time.perf_counter() - begin


def step(side: Side, leaves: tuple[Tensor, ...]) -> None:
    """One forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    out = side()
    out.backward(torch.ones_like(out))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def ceilings(device: torch.device) -> tuple[float, float]:
    """FLOP/s of a bf16 product of 8192-square matrices and byte/s of a copy of 1 GiB (read and write), best of 20."""
    a = torch.randn(8192, 8192, device=device, dtype=torch.bfloat16)
    product = min(seconds(lambda: a @ a, device) for _ in range(20))
    source = torch.empty(2**30, device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy = min(seconds(lambda: target.copy_(source), device) for _ in range(20))
    return 2 * 8192**3 / product, 2 * 2**30 / copy


def useful_flops(args: argparse.Namespace, seq: int, window: int) -> float:
    """Of forward (2 products) and backward (5) over the pairs of one document a row that attention has to look at."""
    pairs = sum(min(i + 1, window or seq) for i in range(seq))
    return 7 * 2 * args.batch * args.heads * args.dim * pairs


def bench(args: argparse.Namespace, seq: int) -> None:
    """Time all sides at one length and print the ratios."""
    device, dtype = current_device(), torch.bfloat16 if args.bf16 else torch.float32
    shapes = ((args.heads,), (args.groups,), (args.groups,))
    qkv = tuple(torch.randn(seq, args.batch, *s, args.dim, device=device, dtype=dtype) for s in shapes)
    sink = torch.zeros(args.heads, device=device)
    leaves = tuple(x.requires_grad_() for x in (*qkv, sink))
    ours = select_backend("auto", window=args.window or None, device=device)
    sides: dict[str, Side] = {ours: our_side(args, ours, qkv, sink)}
    if device.type == "cpu" and ours != "sdpa":
        sides["sdpa"] = our_side(args, "sdpa", qkv, sink)
    if device.type == "cuda":
        sides["flash, no sink"] = flash_side(qkv)
    else:
        sides["reference"] = our_side(args, "reference", qkv, sink)
    sides["megatron-core"] = megatron_side(args, qkv)

    print(
        f"\nbatch {args.batch} x {seq}, {args.documents} documents, heads {args.heads}/{args.groups} of {args.dim}, "
        f"window {args.window or 'none'}, {dtype}, {device}, {args.threads} threads, {args.rounds} rounds"
    )
    memory: dict[str, float] = {}
    for name in list(sides):
        try:
            first = seconds(lambda name=name: step(sides[name], leaves), device)
            for leaf in leaves:
                leaf.grad = None
            peak = PeakMemory(device)
            step(sides[name], leaves)
            memory[name] = peak.over_start() / 2**20
        except torch.OutOfMemoryError:
            print(f"{name}: out of memory")
            del sides[name]
            continue
        if device.type == "cuda" and name == ours:
            print(f"first call of {name}, compilation included: {first:.1f} s")

    taken: dict[str, list[float]] = {name: [] for name in sides}
    for round_number in range(-1, args.rounds):  # one more round to warm up
        names = list(sides)
        turn = round_number % len(names)
        for name in names[turn:] + names[:turn]:
            spent = seconds(lambda name=name: step(sides[name], leaves), device)
            if round_number >= 0:
                taken[name].append(spent)
    report(args, seq, ours, taken, memory)


def report(
    args: argparse.Namespace, seq: int, ours: str, taken: dict[str, list[float]], memory: dict[str, float]
) -> None:
    """The table of one length."""
    device = current_device()
    print(f"{'forward + backward':20s} {'median ms':>10s} {'peak MiB':>9s}   time over {ours}: min / median / max")
    for name, times in taken.items():
        ratios = sorted(other / mine for other, mine in zip(times, taken[ours], strict=True))
        summary = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
        print(f"{name:20s} {1e3 * statistics.median(times):10.2f} {memory[name]:9.1f}   {summary}")
    if device.type != "cuda":
        return
    product, copy = ceilings(device)
    print(f"this card: bf16 product {product / 1e12:.0f} TFLOP/s, copy {copy / 1e12:.2f} TB/s")
    # Read q, k, v and the output's gradient, write the output and three gradients; k and v with G heads.
    moved = args.batch * seq * args.dim * (5 * args.heads + 6 * args.groups) * (2 if args.bf16 else 4)
    for name, times in taken.items():
        window = 0 if name.startswith("flash") else args.window
        flops, bandwidth = useful_flops(args, seq, window) / statistics.median(times), moved / statistics.median(times)
        print(
            f"{name:20s} {flops / 1e12:6.1f} TFLOP/s, {100 * flops / product:5.1f} % of the product; "
            f"at least {bandwidth / 1e12:.3f} TB/s, {100 * bandwidth / copy:5.1f} % of the copy"
        )


def main() -> None:
    """Every length asked for."""
    args = arguments()
    torch.set_num_threads(args.threads)
    with distributed.single_process(seed=1):
        for seq in args.seq:
            bench(args, seq)


if __name__ == "__main__":
    main()
