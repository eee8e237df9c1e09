"""A training step of an eight-layer slice of full scale: speed, MFU, split, profile, memory against the estimate."""

from __future__ import annotations

import torch

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.config.memory import memory_estimate
from megatron_vpmoe.profiling.capture import Subject, Window, capture
from megatron_vpmoe.profiling.stopwatch import PeakMemory, seconds
from megatron_vpmoe.runtime import device
from megatron_vpmoe.training.throughput import Throughput
from scripts.gpu.frame import Findings

LAYERS = 8
WARM, STEPS, TRACED = 2, 5, 2
TOP = 8


def speed(findings: Findings) -> None:
    """First step (compilation), bare steps, clocked and traced ones; the same compiled, against them."""
    eager = _whole(findings)
    if not findings.dry:
        with findings.case("compiled"):
            _compiled(findings, eager)


def _compiled(findings: Findings, eager_s: float) -> None:
    """Bare steps with ``compile: step``, which a first step compiles."""
    torch.compiler.reset()
    subject = Subject(_configuration(findings.dry, "--compile=step"))
    first = seconds(subject.step)
    subject.step()
    step = seconds(subject.step, STEPS)
    findings.row(compile="step", step_ms=1e3 * step, eager_over_it=eager_s / step, first_step_s=round(first, 2))


def _whole(findings: Findings) -> float:
    """The eager step from all sides; returns its seconds."""
    cfg, on_gpu = _configuration(findings.dry), device.has_gpu()
    if on_gpu:  # what has seen other lengths is compiled for any length; a training has one
        torch.compiler.reset()
    peak = PeakMemory()
    subject = Subject(cfg)
    first = seconds(subject.step)
    for _ in range(0 if findings.dry else WARM):
        subject.step()
    throughput = Throughput(cfg, subject.optimizer.normuon_flops())
    throughput.restart()
    for _ in range(1 if findings.dry else STEPS):
        batches = subject.steps[subject.done % len(subject.steps)]
        subject.step()
        throughput.step(subject.tokens, batches)
    report = throughput.report()
    used = peak.over_start()
    findings.traces.mkdir(parents=True, exist_ok=True)
    traced = capture(subject, findings.traces, Window(0, 1 if findings.dry else TRACED), tool="torch")
    tokens, rate = subject.tokens, report["throughput/tokens_per_second"]
    estimate = {
        part: size
        for part, size in memory_estimate(cfg, on_cpu=not on_gpu).parts.items()
        if size and part not in ("process", "batches")
    }
    estimated = sum(estimate.values())
    findings.row(
        layers=cfg.model.num_layers,
        tokens=int(tokens),
        micro_batch=cfg.training.micro_batch_size,
        recomputation=cfg.training.recompute_granularity,
        step_ms=1e3 * tokens / rate,
        tokens_per_second=rate,
        model_tflops=report["throughput/model_tflops"],
        mfu_pct=report.get("throughput/mfu_pct"),
        normuon_pct=report.get("throughput/normuon_pct"),
        first_step_s=round(first, 2),
        compile_s=round(first - tokens / rate, 2) if on_gpu else None,
        peak_gib=used / 2**30,
        estimated_gib=estimated / 2**30,
        estimate_over_peak=estimated / used,
    )
    if throughput.note:
        findings.note(throughput.note)
    split = {name: value for name, value in traced["split_ms"].items() if value}
    findings.note("ms by range, of a step that waits at every border: " + _listed(split))
    top = {each["name"]: each["self_ms"] for each in traced["top_operators"][:TOP]}
    findings.note("ms of a step by operator: " + _listed(top))
    findings.note("GiB estimated: " + ", ".join(f"{part} {size / 2**30:.2f}" for part, size in estimate.items()))
    findings.note(f"trace in {findings.traces}")
    return tokens / rate


def _configuration(dry: bool, *more: str) -> RunConfig:
    """Four micro-batches a step, as one of eight GPUs has them; but this one updates all matrices of its layers."""
    alone = ["--nproc-per-node=1", "--expert-model-parallel-size=1"]
    if dry:
        small = ["--num-layers=2", "--window-attn-skip-freq=2", "--seq-length=96", "--micro-batch-size=2"]
        return load_config("configs/nano/stage1.yaml", [*alone, *small, "--global-batch-size=2", "--bf16=true"])
    size = load_config("configs/vpmoe_stage1.yaml").training.micro_batch_size
    return load_config(
        "configs/vpmoe_stage1.yaml", [*alone, f"--num-layers={LAYERS}", f"--global-batch-size={4 * size}", *more]
    )


def _listed(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.1f}" for name, value in values.items())
