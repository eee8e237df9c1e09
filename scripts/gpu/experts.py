"""The MoE layer of the card against itself in fp64 on the CPU; then its speed against its roofline.

Shapes: T tokens, K experts a token, N = T K rows, E experts, H hidden, F expert FFN width.
"""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any, cast

import torch
from torch import Tensor

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.profiling.stopwatch import Rates, seconds, spread
from megatron_vpmoe.runtime.device import current_device, has_gpu, prepare

prepare()
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402

from megatron_vpmoe.model.transformer_config import transformer_config  # noqa: E402
from scripts.bench.moe import Side, our_layer  # noqa: E402
from scripts.gpu.frame import Findings, Numbers  # noqa: E402
from scripts.gpu.rates import rates_of_card, stated_rates  # noqa: E402

FULL_SCALE = "configs/vpmoe_stage1.yaml"
LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
SMALL = {
    "hidden_size": 256,
    "num_experts": 64,
    "moe_ffn_hidden_size": 128,
    "moe_shared_expert_intermediate_size": 256,
}
DRY = {
    "hidden_size": 64,
    "num_experts": 16,
    "moe_ffn_hidden_size": 32,
    "moe_shared_expert_intermediate_size": 64,
}
ROUNDS = 7


def numbers(dry: bool) -> Numbers:
    """Output, gradients and choice of experts, in fp64."""
    return numbers_of(dry, torch.float64, torch.device("cpu"), None)


def check(findings: Findings) -> None:
    """Routed as on the CPU, equal to it; routed by itself, the same choice; a second time, the same bits."""
    want = findings.expected("experts")
    chosen = want.pop("chosen")
    for dtype, limit in LIMITS.items():
        name = "fp32" if dtype == torch.float32 else "bf16"
        with findings.case(name):
            got = numbers_of(findings.dry, dtype, current_device(), chosen)
            elsewhere = float((got.pop("chosen").cpu() != chosen).any(1).double().mean())
            findings.compare(f"MoE layer, {name}", got, want, limit)
            findings.check(f"share of tokens routed otherwise, {name}", elsewhere, 2e-3)
            again = numbers_of(findings.dry, dtype, current_device(), chosen)
            different = sum(not torch.equal(again[key], value) for key, value in got.items())
            findings.check(f"tensors that a second pass makes otherwise, {name}", different, 0)


def numbers_of(
    dry: bool, dtype: torch.dtype, where: torch.device, replayed: Tensor | None, precision: str | None = None
) -> Numbers:
    """One pass over a small layer, routed by itself or as ``replayed``; ``precision`` is the experts'."""
    sizes = DRY if dry else SMALL
    layer = layer_of(configuration(dtype, **sizes, experts_precision=precision or "null"), where, dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(drawn.mul_(0.02 if "router" in name or parameter.ndim < 2 else 0.06).bfloat16())
    layer.router.expert_bias[::7] = -2.0  # below any score: kernels have gone wrong on experts without tokens
    hidden = layer.config.hidden_size
    x, grad = (torch.randn(128 if dry else 2048, 1, hidden, generator=generator).bfloat16() for _ in range(2))
    x = x.to(where, dtype).requires_grad_()
    router = layer.router
    with torch.no_grad():
        router.recorded = []
        router.choose(x)
        chosen = router.recorded.pop()
        router.recorded = None
    if replayed is not None:
        router.replayed = replayed.to(where), torch.ones(len(replayed), 1, dtype=torch.bool, device=where)
    MoEAuxLossAutoScaler.main_loss_backward_scale = None  # which schedules set, and hand to whoever comes next
    out, _ = layer(x)
    out.backward(grad.to(out))
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    gradients = {f"gradient of {name}": cast(Tensor, parameter.grad) for name, parameter in layer.named_parameters()}
    return {"output": out.detach(), "gradient of the input": cast(Tensor, x.grad), **gradients, "chosen": chosen}


def configuration(dtype: torch.dtype, **fields: object) -> RunConfig:
    alone = {"nproc_per_node": 1, "expert_model_parallel_size": 1, "bf16": str(dtype == torch.bfloat16).lower()}
    flags = {"router_dead_experts_warn": "null", **alone, **fields}
    return load_config(FULL_SCALE, [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()])


def layer_of(cfg: RunConfig, where: torch.device, dtype: torch.dtype) -> Any:
    return our_layer(transformer_config(cfg)).to(where, dtype).train()


@dataclasses.dataclass(frozen=True)
class Product:
    """One grouped product: rows of ``left`` columns become rows of ``right`` columns, or both become a matrix each."""

    rows: int
    left: int
    right: int
    experts: int

    @property
    def flops(self) -> int:
        """Multiplications and additions."""
        return 2 * self.rows * self.left * self.right

    @property
    def moved(self) -> int:
        """Bytes in bf16: either side of the rows and the experts' matrices, each once."""
        return 2 * (self.rows * (self.left + self.right) + self.experts * self.left * self.right)


def products(tokens: int, topk: int, experts: int, hidden: int, ffn: int) -> list[Product]:
    """Of the routed experts: two forward, four backward. Gathering, adding up, activation and bias are not in it: with
    fused kernels they move nothing more."""
    return [Product(tokens * topk, hidden, ffn, experts)] * 6


def roofline(parts: list[Product], rates: Rates) -> float:
    """Seconds that the products take at least, one after the other."""
    return sum(rates.floor(part.flops, part.moved) for part in parts)


def speed(findings: Findings) -> None:
    """A full-scale layer in bf16: forward, and forward and backward."""
    layer = layer_of(configuration(torch.bfloat16, **(DRY if findings.dry else {})), current_device(), torch.bfloat16)
    for tokens in (64, 128) if findings.dry else (4096, 16_384, 32_768):
        with findings.case(f"{tokens} tokens"):
            _timed(findings, layer, tokens)
    layout = layer.experts.last_layout
    findings.note(f"rows of experts: {layout}; the layer also has its router and its shared expert")
    if has_gpu():
        findings.note("the roofline: six grouped products, each operand moved once")


def _timed(findings: Findings, layer: Any, tokens: int) -> None:
    dry, where, config = findings.dry, current_device(), layer.config
    experts, topk, hidden = config.num_moe_experts, config.moe_router_topk, config.hidden_size
    x, grad = (torch.randn(tokens, 1, hidden, device=where, dtype=torch.bfloat16) for _ in range(2))
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    side = Side(layer, x, grad)

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    of_layer = products(tokens, topk, experts, hidden, config.moe_ffn_hidden_size)
    passes = {"forward": (forward, of_layer[:2]), "forward and backward": (side.run, of_layer)}
    for name, (run, parts) in passes.items():
        run()
        times = [seconds(run, 1 if dry else 10) for _ in range(2 if dry else ROUNDS)]
        took, stated = statistics.median(times), stated_rates()
        findings.row(
            tokens=tokens,
            rows_an_expert=tokens * topk / experts,
            what=name,
            ms=spread([1e3 * x for x in times]),
            tflops=sum(part.flops for part in parts) / took / 1e12,
            gigabytes=sum(part.moved for part in parts) / 1e9,
            roofline_share=roofline(parts, rates_of_card(dry)) / took,
            roofline_share_of_stated=None if stated is None else roofline(parts, stated) / took,
        )
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
