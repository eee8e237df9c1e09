"""Training steps on mock data, timed, split by range and traced."""

from __future__ import annotations

import gzip
import json
import math
import shutil
import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state

from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.optim import build_optimizer
from megatron_vpmoe.profiling.clock import TraceMarks, ranges_of
from megatron_vpmoe.profiling.exposed import communication
from megatron_vpmoe.profiling.mock import mock_step
from megatron_vpmoe.profiling.stopwatch import seconds
from megatron_vpmoe.runtime.memory import memory_in_use
from megatron_vpmoe.runtime.range_clock import RangeClock, UpstreamTimers
from megatron_vpmoe.runtime.ranges import listening
from megatron_vpmoe.training.router import RouterMonitor
from megatron_vpmoe.training.step import train_step

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

TOP_OPERATORS = 20
DIFFERENT_STEPS = 4


@dataclass(frozen=True)
class Window:
    """How many steps to leave unmeasured, and how many to take in each of the three passes."""

    warm: int = 3
    steps: int = 5


class Subject:
    """A model in training whose steps can be repeated at will; process groups must exist."""

    def __init__(self, cfg: RunConfig) -> None:
        self.cfg = cfg
        self.model = build_model(cfg)
        self.wrapped = wrap_for_training(self.model, cfg)
        self.optimizer = build_optimizer([self.wrapped], cfg)
        self.objective = build_objective(cfg)
        self.monitor = RouterMonitor(self.model, cfg)
        self.health: dict[str, float] = {}
        self.tokens, self.loss = 0.0, math.nan
        # Made in advance, as the loop's own thread does: making rows is no part of a step.
        rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        self.steps = [mock_step(cfg, step=step, dp_rank=rank, dp_size=size) for step in range(DIFFERENT_STEPS)]
        self.done = 0
        """Steps so far, which says whose turn it is among ``steps``."""

    def step(self) -> None:
        """One step as the loop makes it, router health included."""
        self.monitor.reset()
        batches = self.steps[self.done % len(self.steps)]
        result = train_step(self.wrapped, self.optimizer, self.objective, batches)
        self.tokens, self.loss = result.metrics["tokens/real"], result.metrics["loss/total"]
        self.health = self.monitor.metrics(self.tokens)
        self.done += 1


def capture(subject: Subject, directory: Path, window: Window, *, tool: str) -> dict[str, Any]:
    """Three passes over the same steps: bare (speed), clocked (split by range), traced (operators).

    Args:
        subject: what takes the steps.
        directory: for the trace of "torch"; Nsight Systems writes its own.
        tool: "torch", or "nsys" inside ``nsys profile --capture-range=cudaProfilerApi``.

    Returns:
        the summary's measurements; times in milliseconds a step.
    """
    for _ in range(window.warm):
        subject.step()
    bare = [seconds(subject.step) for _ in range(window.steps)]
    names = (*ranges_of(subject.cfg), "step")
    clock = RangeClock(names)
    clocked = seconds(lambda: _listen(subject, clock, window.steps))
    if tool == "nsys":
        torch.cuda.profiler.start()
        _listen(subject, TraceMarks(), window.steps)
        torch.cuda.profiler.stop()
        operators, exposed = list[dict[str, Any]](), None
    else:
        operators, exposed = _traced(subject, window.steps, directory)
    step = statistics.median(bare)
    return {
        "step_ms": {"min": _ms(min(bare)), "median": _ms(step), "max": _ms(max(bare))},
        "tokens_per_step": subject.tokens,
        "tokens_per_second": round(subject.tokens / step, 1),
        "clocked_step_ms": _ms(clocked / window.steps),
        "split_ms": {
            ("other" if name == "step" else name): _ms(clock.seconds.get(name, 0.0) / window.steps) for name in names
        },
        "communication_ms": exposed and {name: round(value / window.steps, 3) for name, value in exposed.items()},
        "peak_memory_mib": round(memory_in_use()["peak"] / 2**20, 1),
        "router_agg": {tag: value for tag, value in subject.health.items() if tag.startswith("moe/router_agg/")},
        "top_operators": operators,
    }


def _listen(subject: Subject, listener: Any, steps: int) -> None:
    subject.model.config.timers = UpstreamTimers(listener)
    with listening(listener):
        for _ in range(steps):
            listener.enter("step")
            subject.step()
            listener.leave("step")
    subject.model.config.timers = None


def _traced(subject: Subject, steps: int, directory: Path) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Write ``trace.json.gz`` (Chrome, Perfetto); the operators that take most time themselves, and communication."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    marks = TraceMarks()
    with torch.profiler.profile(activities=activities) as profile:
        _listen(subject, marks, steps)
    plain = directory / "trace.json"
    profile.export_chrome_trace(str(plain))
    with plain.open("rb") as source, gzip.open(directory / "trace.json.gz", "wb", compresslevel=4) as packed:
        shutil.copyfileobj(source, packed)
    events = json.loads(plain.read_bytes())["traceEvents"]
    plain.unlink()
    where = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    operators = [event for event in profile.key_averages() if event.key not in marks.names]
    operators.sort(key=lambda event: getattr(event, where), reverse=True)
    return [
        {"name": event.key, "self_ms": round(getattr(event, where) / 1e3 / steps, 3), "calls": event.count / steps}
        for event in operators[:TOP_OPERATORS]
    ], communication(events)._asdict()


def _ms(seconds: float) -> float:
    return round(1e3 * seconds, 3)
