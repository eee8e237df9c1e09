"""Ranges of a step: every second in one of them, upstream's timers included; mock rows; the environment's checks."""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.config.parameters import EMBEDDING
from megatron_vpmoe.errors import ConfigError, DeviceError
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.profiling.__main__ import launch, settings
from megatron_vpmoe.profiling.capture import Subject, Window, capture
from megatron_vpmoe.profiling.clock import ranges_of
from megatron_vpmoe.profiling.mock import mock_step
from megatron_vpmoe.runtime import range_clock, ranges
from megatron_vpmoe.runtime.range_clock import RangeClock, UpstreamTimers
from megatron_vpmoe.runtime.ranges import annotated, listening
from megatron_vpmoe.think.recall import store_of
from tests.tiny import MIXTURE, ROOT, tiny_config


class Ticks:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    ticks = Ticks()
    monkeypatch.setattr(range_clock, "time", ticks)
    return ticks


def test_each_second_belongs_to_the_innermost_range(ticks: Ticks) -> None:
    clock = RangeClock()
    timers = UpstreamTimers(clock)
    with listening(clock), annotated("step"):
        ticks.now += 1.0
        timers("forward-compute", log_level=2).start()
        ticks.now += 2.0
        with annotated("dispatch"):
            ticks.now += 4.0
        timers("forward-compute").stop()
        timers("optimizer-inner-step", log_level=1).start(barrier=False)  # not a range of ours
        ticks.now += 8.0
        timers("optimizer-inner-step").stop()
    assert clock.seconds == {"step": 9.0, "forward": 2.0, "dispatch": 4.0}


def test_a_range_that_overlaps_is_an_error(ticks: Ticks) -> None:
    clock = RangeClock()
    clock.enter("forward")
    clock.enter("dispatch")
    with pytest.raises(ValueError, match="'forward' ends inside 'dispatch'"):
        clock.leave("forward")


def test_an_error_inside_goes_through_as_it_is(ticks: Ticks) -> None:
    """Upstream's timers are no blocks: what interrupts a pass, such as a polite stop, never comes to their end."""
    clock = RangeClock()
    timers = UpstreamTimers(clock)
    with pytest.raises(KeyError, match="stop"), listening(clock), annotated("step"):
        timers("forward-compute").start()
        with annotated("dispatch"):
            raise KeyError("stop")


def test_an_exception_that_is_caught_within_a_range_ends_those_in_it(ticks: Ticks) -> None:
    """torch ends a recomputation so, in the middle of its layer, as soon as all is there that backward asks for."""
    clock = RangeClock()
    timers = UpstreamTimers(clock)
    with listening(clock), annotated("step"):
        timers("backward-compute").start()
        with contextlib.suppress(StopIteration), annotated("layer"), annotated("attention"):
            ticks.now += 1.0
            raise StopIteration
        ticks.now += 2.0
        timers("backward-compute").stop()
    assert clock.seconds == {"step": 0.0, "attention": 1.0, "layer": 0.0, "backward": 2.0}


def test_nobody_listens_outside() -> None:
    clock = RangeClock()
    with listening(clock):
        pass
    with annotated("step"):
        pass
    assert clock.seconds == {}


def test_what_runs_beside_a_step_is_no_part_of_it() -> None:
    heard = []
    listener = SimpleNamespace(enter=heard.append, leave=lambda name: heard.append(f"/{name}"))

    def sample() -> None:
        with ranges.beside(), annotated("attention"):
            pass

    with ranges.listening(listener), annotated("step"):
        other = threading.Thread(target=sample)
        other.start()
        other.join()
    assert heard == ["step", "/step"]


def test_mock_rows_are_full_and_repeatable() -> None:
    cfg = tiny_config()
    (first, second), again = mock_step(cfg, step=3), mock_step(cfg, step=3)
    assert first.real_tokens == first.tokens.numel() == 2 * 48
    assert first.tokens.equal(again[0].tokens) and not first.tokens.equal(second.tokens)
    assert first.loss_mask.any() and int(first.span_id.max()) == 2
    (other,) = mock_step(cfg, step=3, dp_rank=1, dp_size=2)
    assert not other.tokens.equal(first.tokens)


def with_a_store(path: Path) -> RunConfig:
    """A mixture that reads one over the embedding that the next model will have."""
    torch.manual_seed(0)
    table = build_model(tiny_config(**MIXTURE)).get_parameter(EMBEDDING)
    store_of(np.random.default_rng(2).integers(1, 64, (12, 20)), table, chunk=4).save(path)
    torch.manual_seed(0)
    return tiny_config(**MIXTURE, memory_entries=3, store=path)


ALONE: dict[str, Any] = {**MIXTURE, "mixture_experts": None, "num_layers": 2}
KINDS: dict[str, tuple[Callable[[Path], RunConfig], set[str]]] = {
    "experts in their place": (
        lambda _: tiny_config(),
        {"attention", "feed_forward", "dispatch", "router", "experts", "shared_expert"},
    ),
    "mixture": (
        with_a_store,
        {"recall", "latent_attention", "router", "adapters"}
        | {f"experts.{kind}" for kind in ("transformer", "state_space", "denoiser")},
    ),
    "state_space": (
        lambda _: tiny_config(**ALONE, layer_type="state_space", objective="token_ce", train_only=None),
        {"state_space"},
    ),
    "denoiser": (
        lambda _: tiny_config(**ALONE, layer_type="denoiser", objective="denoising", train_only='["decoder.*"]'),
        {"context", "estimate"},
    ),
}


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("kind", KINDS)
def test_capture_splits_a_whole_step(kind: str, tmp_path: Path) -> None:
    """Every range of a step of such a model is found, those alone are told of, and the trace holds them."""
    config, parts = KINDS[kind]
    cfg = config(tmp_path / "some.store")
    names = set(ranges_of(cfg))
    assert names == {"forward", *parts, "loss", "backward", "optimizer", "communication"}
    found = capture(Subject(cfg), tmp_path, Window(warm=1, steps=1), tool="torch")
    split = found["split_ms"]
    assert set(split) == {*names, "other"}
    assert all(value > 0 for value in split.values()), split
    assert found["tokens_per_second"] == pytest.approx(4 * 48 / found["step_ms"]["median"] * 1e3, rel=1e-2)
    assert found["peak_memory_mib"] > 0
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert names <= {event.get("name") for event in trace["traceEvents"]}
    operators = {operator["name"] for operator in found["top_operators"]}
    assert operators and not operators & {*names, "attention", "feed_forward", "state_space", "step"}
    assert found["communication_ms"]["total"] >= found["communication_ms"]["exposed"] >= 0
    if kind == "experts in their place":
        assert found["router_agg"]["moe/router_agg/experts_active_mean"] > 0


@pytest.mark.slow
@pytest.mark.usefixtures("single_process")
def test_ranges_of_the_nano_step_sum_to_it(tmp_path: Path) -> None:
    """Within 3 % of a clock around all steps: what is in no range but inside a step is "other"."""
    cfg = load_config(ROOT / "configs" / "nano" / "stage1.yaml", settings({"PROFILE_SEQ_LEN": "384"}, []).overrides)
    found = capture(Subject(cfg), tmp_path, Window(warm=1, steps=2), tool="torch")
    split = found["split_ms"]
    assert sum(split.values()) == pytest.approx(found["clocked_step_ms"], rel=0.03)
    assert split["other"] < 0.25 * found["clocked_step_ms"]


def test_nsys_traces_the_window_that_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the program and a GPU there, the workers run below it, and it listens between the profiler's two calls."""
    program = tmp_path / "nsys"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    started: list[list[str]] = []
    monkeypatch.setattr(
        subprocess, "run", lambda words, **_: started.append(words) or subprocess.CompletedProcess(words, 0)
    )
    assert launch(settings({"PROFILE_TOOL": "nsys", "PROFILE_NPROC_PER_NODE": "2"}, ["--bf16"])) == 0
    (words,) = started
    assert words[:2] == ["nsys", "profile"] and "--capture-range=cudaProfilerApi" in words and words[-1] == "--bf16"
    assert words.index("torch.distributed.run") < words.index("megatron_vpmoe.profiling")
    assert any(word.startswith("--output=artifacts/profiles/") and "nvidia-h100/nsys" in word for word in words)


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("PROFILE_TOOL", "perf", "no profiler 'perf'"),
        ("PROFILE_TRANSFORMER_IMPL", "transformer_engine", "no layers of 'transformer_engine'"),
        ("PROFILE_STEPS", "0", "PROFILE_STEPS='0'"),
        ("PROFILE_RUN", "../x", "no name of a folder"),
    ],
)
def test_bad_environment(variable: str, value: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        settings({variable: value}, [])


def test_absent_nsys_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="nsight-systems"):
        settings({"PROFILE_TOOL": "nsys"}, [])


def test_the_environment_becomes_the_geometry() -> None:
    found = settings({"PROFILE_SEQ_LEN": "1024", "PROFILE_NPROC_PER_NODE": "2", "PROFILE_EP": "2"}, ["--bf16"])
    assert {"--seq-length=1024", "--global-batch-size=2", "--expert-model-parallel-size=2"} <= set(found.overrides)
    assert found.overrides[-1] == "--bf16" and (found.tool, found.run) == ("torch", "nano_stage1")
    own = settings({"PROFILE_SEQ_LEN": "1024"}, ["--seq_length", "64"]).overrides  # a flag may be given once
    assert own[-2:] == ["--seq_length", "64"] and not [word for word in own if word.startswith("--seq-length")]
