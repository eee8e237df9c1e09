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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from megatron_vpmoe.profiling.stopwatch import PeakMemory, in_turns, measured_rates, seconds
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.device import current_device, has_gpu, prepare

prepare()

from megatron.core.transformer.dot_product_attention import DotProductAttention  # noqa: E402
from megatron.core.transformer.enums import AttnMaskType  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from megatron_vpmoe.model.attention.backends import core_attention, select_backend  # noqa: E402
from megatron_vpmoe.model.attention.grape import alibi_slopes  # noqa: E402
from megatron_vpmoe.model.attention.masks import SequenceLayout  # noqa: E402

Side = Callable[[], Tensor]
FLASH = "flash, no sink"


@dataclass(frozen=True)
class Layer:
    """One layer's attention."""

    seq: int
    batch: int = 8
    heads: int = 4
    groups: int = 2
    dim: int = 32
    window: int = 32
    """0: a global layer, with GRAPE-A's bias."""
    documents: int = 1
    """Of equal length that a row packs."""
    bf16: bool = False
    masks_kept: bool = False
    """Masks are made before the first call, as the layers of a step share them; else anew in each."""

    @property
    def useful_flops(self) -> float:
        """Of forward (2 products) and backward (5) over the pairs of one document a row that have to be looked at."""
        return self._flops(min(self.window or self.seq, self.seq))

    @property
    def causal_flops(self) -> float:
        """The same without the window."""
        return self._flops(self.seq)

    @property
    def least_bytes(self) -> int:
        """Read q, k, v and the output's gradient, write the output and three gradients; k and v with G heads."""
        return self.batch * self.seq * self.dim * (5 * self.heads + 6 * self.groups) * (2 if self.bf16 else 4)

    def _flops(self, window: int) -> float:
        pairs = window * (window + 1) / 2 + (self.seq - window) * window
        return 7 * 2 * self.batch * self.heads * self.dim * pairs


@dataclass
class Timing:
    """Of one side of a layer, forward and backward."""

    first_seconds: float
    """The first call; of flex with the compilation."""
    peak_mib: float
    seconds: list[float]


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


def documents(layer: Layer) -> SequenceLayout:
    """Those of each row, on the device; no mask is made of them yet."""
    row = torch.arange(layer.seq, device=current_device())
    each = -(-layer.seq // layer.documents)
    ids, position = (x.expand(layer.batch, -1).contiguous() for x in ((row // each).int(), row % each))
    return SequenceLayout(ids, position)


def our_side(layer: Layer, backend: str, qkv: tuple[Tensor, ...], sink: Tensor) -> Side:
    """One of our backends."""
    device, layout = qkv[0].device, documents(layer)

    def run() -> Tensor:
        return core_attention(
            *(x.permute(1, 2, 0, 3) for x in qkv),
            layout=layout if layer.masks_kept else SequenceLayout(layout.document_id, layout.position),
            window=layer.window or None,
            alibi_slopes_H=None if layer.window else alibi_slopes(layer.heads, device),
            sink_H=sink,
            softmax_scale=layer.dim**-0.5,
            backend=backend,
        )

    return run


def megatron_side(layer: Layer, qkv: tuple[Tensor, ...]) -> Side:
    """Megatron-Core's unfused attention with its learnable softmax offset; in global layers it has no distance bias."""
    config = TransformerConfig(
        num_layers=1,
        hidden_size=layer.heads * layer.dim,
        num_attention_heads=layer.heads,
        num_query_groups=layer.groups,
        kv_channels=layer.dim,
        attention_dropout=0.0,
        softmax_type="learnable",
        window_size=(layer.window - 1, 0) if layer.window else None,
        bf16=layer.bf16,
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


def step(side: Side, leaves: tuple[Tensor, ...]) -> None:
    """One forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    out = side()
    out.backward(torch.ones_like(out))


def measure(layer: Layer, rounds: int, calls: int = 1) -> tuple[str, dict[str, Timing], list[str]]:
    """Time all sides: the backend that "auto" takes, what a side gave, and the sides that ran out of memory."""
    device, dtype = current_device(), torch.bfloat16 if layer.bf16 else torch.float32
    shapes = ((layer.heads,), (layer.groups,), (layer.groups,))
    qkv = tuple(torch.randn(layer.seq, layer.batch, *s, layer.dim, device=device, dtype=dtype) for s in shapes)
    sink = torch.zeros(layer.heads, device=device)
    leaves = tuple(x.requires_grad_() for x in (*qkv, sink))
    ours = select_backend("auto", window=layer.window or None, device=device)
    sides: dict[str, Side] = {ours: our_side(layer, ours, qkv, sink)}
    if device.type == "cpu" and ours != "sdpa":
        sides["sdpa"] = our_side(layer, "sdpa", qkv, sink)
    if has_gpu():
        sides[FLASH] = flash_side(qkv)
    sides["reference"] = our_side(layer, "reference", qkv, sink)
    sides["megatron-core"] = megatron_side(layer, qkv)
    found, failed = {}, []
    steps = {name: partial(step, side, leaves) for name, side in sides.items()}
    for name in sides:
        try:
            first = seconds(steps[name])
            for leaf in leaves:
                leaf.grad = None
            peak = PeakMemory()
            steps[name]()
            found[name] = Timing(first, peak.over_start() / 2**20, [])
        except torch.OutOfMemoryError:
            failed.append(name)
    for name, times in in_turns({name: steps[name] for name in found}, rounds, calls).items():
        found[name].seconds += times
    return ours, found, failed


def report(layer: Layer, ours: str, found: dict[str, Timing]) -> None:
    """The table of one length."""
    print(f"{'forward + backward':20s} {'median ms':>10s} {'peak MiB':>9s}   time over {ours}: min / median / max")
    for name, timing in found.items():
        times = timing.seconds
        ratios = sorted(other / mine for other, mine in zip(times, found[ours].seconds, strict=True))
        summary = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
        print(f"{name:20s} {1e3 * statistics.median(times):10.2f} {timing.peak_mib:9.1f}   {summary}")
    if not has_gpu():
        return
    rates = measured_rates(torch.bfloat16)
    print(f"first call of {ours}, compilation included: {found[ours].first_seconds:.1f} s")
    print(f"this card: bf16 product {rates.flops / 1e12:.0f} TFLOP/s, copy {rates.bandwidth / 1e12:.2f} TB/s")
    for name, timing in found.items():
        took = statistics.median(timing.seconds)
        flops = (layer.causal_flops if name == FLASH else layer.useful_flops) / took
        bandwidth = layer.least_bytes / took
        print(
            f"{name:20s} {flops / 1e12:6.1f} TFLOP/s, {100 * flops / rates.flops:5.1f} % of the product; "
            f"at least {bandwidth / 1e12:.3f} TB/s, {100 * bandwidth / rates.bandwidth:5.1f} % of the copy"
        )


def main() -> None:
    """Every length asked for."""
    args = arguments()
    torch.set_num_threads(args.threads)
    with distributed.single_process(seed=1):
        for seq in args.seq:
            layer = Layer(
                seq, args.batch, args.heads, args.groups, args.dim, args.window, args.documents, bf16=args.bf16
            )
            ours, found, failed = measure(layer, args.rounds)
            print(f"\n{layer}, {current_device()}, {args.threads} threads, {args.rounds} rounds")
            for name in failed:
                print(f"{name}: out of memory")
            report(layer, ours, found)


if __name__ == "__main__":
    main()
