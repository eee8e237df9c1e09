"""NorMuon and AdamW of the card against fp64 on the CPU; then NorMuon on full-size layers against its floor."""

from __future__ import annotations

import statistics

import torch

from megatron_vpmoe.config import load_config
from megatron_vpmoe.config.memory import STACK_BYTES
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.optim import assignment_table
from megatron_vpmoe.optim.build import normuon_options
from megatron_vpmoe.optim.matrix_layout import matrix_layout
from megatron_vpmoe.optim.normuon import NorMuon, NorMuonOptions
from megatron_vpmoe.profiling.stopwatch import PeakMemory, seconds, spread
from megatron_vpmoe.runtime.device import available_memory, current_device
from scripts.gpu.frame import Findings, Numbers
from scripts.gpu.rates import rates_of_card

FULL_SCALE = "configs/vpmoe_stage1.yaml"
LR, DECAY, STEPS = 1e-2, 0.1, 3
LIMITS = {"adamw, fp32": 3e-5, "normuon, fp32": 1e-3, "normuon, bf16": 3e-2}
"""Of what the weights moved by. bf16 is that of Polar Express's products: Gaussian matrices come out within 2 %
(docs/optimizer.md)."""
WORKING_BYTES = 3 * STACK_BYTES["cuda"]


def numbers(dry: bool) -> Numbers:
    """What the weights moved by, in fp64."""
    return {kind: x for kind in ("adamw", "normuon") for x in [_moved(kind, torch.float64, torch.device("cpu"), dry)]}


def check(findings: Findings) -> None:
    """Either optimizer, NorMuon also with its products in bf16."""
    want = findings.expected("optimizer")
    for name, limit in LIMITS.items():
        kind, _, dtype = name.partition(", ")
        computed = torch.float32 if dtype == "fp32" else torch.bfloat16
        with findings.case(name):
            got = _moved(kind, torch.float32, current_device(), findings.dry, computed)
            findings.compare(f"{name}, weights after {STEPS} steps", {kind: got}, {kind: want[kind]}, limit)


def _moved(
    kind: str, dtype: torch.dtype, where: torch.device, dry: bool, computed: torch.dtype | None = None
) -> torch.Tensor:
    """All weights' changes, one behind the other: experts of which one idles, wide, tall and square matrices."""
    side = 32 if dry else 128
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).float()

    shapes = [(8, side, 4 * side), (8, 4 * side, side), (side, side), (2 * side, side), (side, 3 * side)]
    start = [draw(*shape) for shape in shapes]
    params = [torch.nn.Parameter(x.to(where, dtype, copy=True)) for x in start]
    if kind == "normuon":
        options = NorMuonOptions(compute_dtype=computed or dtype)
        optimizer: torch.optim.Optimizer = NorMuon(params, LR, DECAY, options=options)
    else:
        optimizer = torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.95), weight_decay=DECAY, fused=True)
    for _ in range(STEPS):
        for param, shape in zip(params, shapes, strict=True):
            grad = draw(*shape)
            if len(shape) == 3:
                grad[3] = 0.0
            param.grad = grad.to(where, dtype)
        optimizer.step()
    moved = [(param.detach().cpu() - x).double().flatten() for param, x in zip(params, start, strict=True)]
    return torch.cat(moved)


def speed(findings: Findings) -> None:
    """NorMuon's step over the matrices of as many layers as fit, gradients random, on one card."""
    config = "configs/nano/stage1.yaml" if findings.dry else FULL_SCALE
    cfg = load_config(config, ["--nproc-per-node=1", "--expert-model-parallel-size=1"])
    device, free = current_device(), available_memory()[0]
    model = build_model(cfg, device=torch.device("meta"))
    routed = {row.name for row in assignment_table(model, cfg) if row.matrices}
    by_layer: dict[int, list[torch.nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if name in routed:
            by_layer.setdefault(int(name.split(".")[2]), []).append(param)
    # Weight, gradient and momentum, fp32 each.
    layers, left = 0, 1 if findings.dry else 0.9 * free - WORKING_BYTES
    chosen: list[torch.nn.Parameter] = []
    for number in sorted(by_layer):
        left -= 12 * sum(param.numel() for param in by_layer[number])
        if chosen and left < 0:
            break
        chosen += by_layer[number]
        layers = number + 1
    params = []
    for param in chosen:
        here = torch.nn.Parameter(torch.randn(param.shape, device=device))
        here.grad = torch.randn_like(here)
        for attribute in ("matrix_rows", "allreduce"):
            if hasattr(param, attribute):
                setattr(here, attribute, getattr(param, attribute))
        params.append(here)
    optimizer = NorMuon(params, 1e-3, DECAY, options=normuon_options(cfg.optim))
    optimizer.initialize_state()
    peak = PeakMemory()
    optimizer.step()
    times = [seconds(optimizer.step) for _ in range(1 if findings.dry else 5)]
    took, rates = statistics.median(times), rates_of_card(findings.dry)
    flops, elements = optimizer.flops(), sum(param.numel() for param in params)
    moved = 5 * 4 * elements  # gradient, momentum and weight read, the last two written
    findings.row(
        layers=layers,
        matrices=sum(matrix_layout(param).count for param in params),
        ms=spread([1e3 * x for x in times]),
        teraflop=flops / 1e12,
        tflops=flops / took / 1e12,
        floor_ms=1e3 * rates.floor(flops, moved),
        floor_compute_ms=1e3 * flops / rates.flops,
        floor_memory_ms=1e3 * moved / rates.bandwidth,
        floor_share=rates.floor(flops, moved) / took,
        working_mib=round(peak.over_start() / 2**20, 1),
    )
    findings.note("the floor: Polar Express's products at the measured rate of a large one, or each operand moved once")
