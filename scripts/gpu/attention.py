"""Every attention backend of the card against dense attention in fp64 on the CPU; then flex against the others."""

from __future__ import annotations

import statistics

import torch
from torch import Tensor

from megatron_vpmoe.model.attention.backends import core_attention
from megatron_vpmoe.model.attention.backends.flex import block_mask
from megatron_vpmoe.model.attention.grape import alibi_slopes
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.profiling.stopwatch import seconds, spread
from megatron_vpmoe.runtime.device import current_device, has_gpu
from scripts.bench.attention import FLASH, Layer, documents, measure
from scripts.gpu.frame import Findings, Numbers
from scripts.gpu.rates import rates_of_card

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
CASES = {"local": (128, False, True), "global": (None, True, True), "plain": (None, False, False)}
"""Window, bias on distance, sink: vpMoE's two kinds of layer, and Qwen3's."""
LENGTHS = (2048, 8192, 32_768)
ROUNDS = 5


def numbers(dry: bool) -> Numbers:
    """Output and gradients of each case, by dense attention in fp64."""
    found = {}
    for case in CASES:
        for name, value in _outputs(case, "reference", torch.float64, torch.device("cpu"), dry).items():
            found[f"{case}/{name}"] = value
    return found


def check(findings: Findings) -> None:
    """Every backend that the device has, in fp32 and bf16; the compiled one in bf16: "designs" has it in fp32."""
    expected, device = findings.expected("attention"), current_device()
    for dtype, limit in LIMITS.items():
        for case, (window, alibi, _) in CASES.items():
            banded = ["banded"] if window is not None and not alibi else []
            fused = ["flex" if has_gpu() else "sdpa"] if dtype == torch.bfloat16 else []
            for backend in ["reference", *banded, *fused]:
                want = {name.partition("/")[2]: x for name, x in expected.items() if name.startswith(f"{case}/")}
                name = f"{backend}, {case} layer, {_name(dtype)}"
                with findings.case(name):
                    findings.compare(name, _outputs(case, backend, dtype, device, findings.dry), want, limit)


def _outputs(case: str, backend: str, dtype: torch.dtype, device: torch.device, dry: bool) -> Numbers:
    """Of inputs that bf16 holds exactly: packed documents, padding, a last tile in part."""
    window, alibi, with_sink = CASES[case]
    heads, groups, dim = (4, 2, 32) if dry else (8, 2, 128)
    layout = _layout([[100, 40, -4], [144]] if dry else [[300, 190, 90, -20], [600]])
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64).bfloat16()
        return drawn.to(device, dtype).requires_grad_()

    rows = layout.document_id.shape
    q, k, v = (draw(rows[0], count, rows[1], dim) for count in (heads, groups, groups))
    sink = draw(heads).detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
    out = core_attention(
        q,
        k,
        v,
        layout=SequenceLayout(layout.document_id.to(device), layout.position.to(device), recurs=True),
        window=window if window is None or not dry else window // 4,
        alibi_slopes_H=alibi_slopes(heads, device) if alibi else None,
        sink_H=sink if with_sink else None,
        softmax_scale=dim**-0.5,
        backend=backend,
    )
    inputs = {"q": q, "k": k, "v": v, **({"sink": sink} if with_sink else {})}
    cotangent = torch.randn(out.shape, generator=generator, dtype=torch.float64).bfloat16().to(out)
    gradients = torch.autograd.grad(out, list(inputs.values()), cotangent)
    return {"output": out.detach(), **{f"gradient of {n}": g for n, g in zip(inputs, gradients, strict=True)}}


def _layout(rows: list[list[int]]) -> SequenceLayout:
    """Rows of documents by their lengths; a negative one is padding."""
    ids = [[-1 if n < 0 else i for i, n in enumerate(row) for _ in range(abs(n))] for row in rows]
    positions = [[0 if n < 0 else at for n in row for at in range(abs(n))] for row in rows]
    return SequenceLayout(torch.tensor(ids, dtype=torch.int32), torch.tensor(positions))


def speed(findings: Findings) -> None:
    """A full-scale layer of either kind, one row of one document; forward and backward, in turns.

    Masks are there already, as in all layers of a step but the first of each kind; what they take is told apart.
    """
    geometry = (1, 4, 2, 32) if findings.dry else (1, 8, 2, 128)
    for seq in (64, 128) if findings.dry else LENGTHS:
        for kind, window in (("local", 32 if findings.dry else 128), ("global", 0)):
            with findings.case(f"{kind} layer, {seq} tokens"):
                _timed(findings, kind, Layer(seq, *geometry, window=window, bf16=True, masks_kept=True))


def _timed(findings: Findings, kind: str, layer: Layer) -> None:
    rates, calls = rates_of_card(findings.dry), 1 if findings.dry else max(1, 16_384 // layer.seq)
    if has_gpu():  # what has seen other lengths is compiled for any length; a training has one
        torch.compiler.reset()
    ours, found, failed = measure(layer, 1 if findings.dry else ROUNDS, calls)
    for name, timing in found.items():
        took = statistics.median(timing.seconds)
        flops = layer.causal_flops if name == FLASH else layer.useful_flops
        findings.row(
            seq=layer.seq,
            layer=kind,
            side=name,
            ms=spread([1e3 * x for x in timing.seconds]),
            over_ours=statistics.median(a / b for a, b in zip(timing.seconds, found[ours].seconds, strict=True)),
            tflops=flops / took / 1e12,
            floor_share=rates.floor(flops, layer.least_bytes) / took,
            peak_mib=round(timing.peak_mib, 1),
            first_call_s=round(timing.first_seconds, 2),
        )
    for name in failed:
        findings.note(f"{name}, {kind} layer, {layer.seq} tokens: out of memory")
    if ours == "flex":
        mask = min(seconds(lambda: block_mask(documents(layer), layer.window or None), calls) for _ in range(ROUNDS))
        findings.note(f"{kind} layer, {layer.seq} tokens: its mask, made once a micro-batch, takes {1e3 * mask:.3g} ms")


def _name(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
