"""Forward and backward of one layer's attention: the backend that `auto` picks against the others and Megatron-Core's.

Every round times each side once, in an order that rotates, and forms the ratios within the round: a machine that slows
down slows all sides. Each row is a single document, since Megatron-Core's unfused attention knows no packing.

    python scripts/bench/attention.py --seq 2048 --heads 8 --groups 2 --dim 128 --window 128
    python scripts/bench/attention.py --window 0        # a global layer with GRAPE-A's bias
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

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
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--groups", type=int, default=2)
    parser.add_argument("--dim", type=int, default=32, help="head dimension")
    parser.add_argument("--window", type=int, default=32, help="0: a global layer")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    return parser.parse_args()


def our_side(args: argparse.Namespace, backend: str, qkv: tuple[Tensor, ...], sink: Tensor) -> Side:
    """One of our backends; the masks are built anew in each call, as in the first layer of a step."""
    device = qkv[0].device
    document = torch.zeros(args.batch, args.seq, dtype=torch.int32, device=device)
    position = torch.arange(args.seq, device=device).expand(args.batch, -1)

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


def milliseconds(side: Side, leaves: tuple[Tensor, ...]) -> float:
    """One forward and backward, gradients dropped first."""
    for leaf in leaves:
        leaf.grad = None
    _synchronize(leaves[0].device)
    begin = time.perf_counter()
    out = side()
    out.backward(torch.ones_like(out))
    _synchronize(leaves[0].device)
    return 1e3 * (time.perf_counter() - begin)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    """Time all sides and print the ratios."""
    args = arguments()
    torch.set_num_threads(args.threads)
    device, dtype = current_device(), torch.bfloat16 if args.bf16 else torch.float32
    with distributed.single_process(seed=1):
        shapes = ((args.heads,), (args.groups,), (args.groups,))
        qkv = tuple(torch.randn(args.seq, args.batch, *s, args.dim, device=device, dtype=dtype) for s in shapes)
        sink = torch.zeros(args.heads, device=device)
        leaves = tuple(x.requires_grad_() for x in (*qkv, sink))
        ours = select_backend("auto", window=args.window or None, device=device)
        sides: dict[str, Side] = {ours: our_side(args, ours, qkv, sink)}
        if device.type == "cpu" and ours != "sdpa":
            sides["sdpa"] = our_side(args, "sdpa", qkv, sink)
        if ours != "reference":
            sides["reference"] = our_side(args, "reference", qkv, sink)
        sides["megatron-core"] = megatron_side(args, qkv)

        taken: dict[str, list[float]] = {name: [] for name in sides}
        for round_number in range(-2, args.rounds):  # two rounds to warm up
            names = list(sides)
            first = round_number % len(names)
            for name in names[first:] + names[:first]:
                spent = milliseconds(sides[name], leaves)
                if round_number >= 0:
                    taken[name].append(spent)

    print(
        f"batch {args.batch} x {args.seq}, heads {args.heads}/{args.groups} of {args.dim}, "
        f"window {args.window or 'none'}, {dtype}, {device}, {args.threads} threads, {args.rounds} rounds"
    )
    print(f"{'forward + backward':20s} {'median ms':>10s}   time over {ours}: min / median / max")
    for name, times in taken.items():
        ratios = sorted(other / mine for other, mine in zip(times, taken[ours], strict=True))
        summary = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
        print(f"{name:20s} {statistics.median(times):10.2f}   {summary}")


if __name__ == "__main__":
    main()
