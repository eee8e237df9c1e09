"""Ranges of a step: every second in one of them, upstream's timers included; mock rows; the environment's checks."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from megatron_vpmoe.errors import ConfigError, DeviceError
from megatron_vpmoe.profiling import clock as clock_module
from megatron_vpmoe.profiling.__main__ import settings
from megatron_vpmoe.profiling.capture import Window, capture
from megatron_vpmoe.profiling.clock import RANGES, RangeClock, UpstreamTimers
from megatron_vpmoe.profiling.mock import mock_step
from megatron_vpmoe.runtime.ranges import annotated, listening
from tests.tiny import tiny_config


class Ticks:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        return self.now


@pytest.fixture
def ticks(monkeypatch: pytest.MonkeyPatch) -> Ticks:
    ticks = Ticks()
    monkeypatch.setattr(clock_module, "time", ticks)
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


def test_nobody_listens_outside() -> None:
    clock = RangeClock()
    with listening(clock):
        pass
    with annotated("step"):
        pass
    assert clock.seconds == {}


def test_mock_rows_are_full_and_repeatable() -> None:
    cfg = tiny_config()
    (first, second), again = mock_step(cfg, step=3), mock_step(cfg, step=3)
    assert first.real_tokens == first.tokens.numel() == 2 * 48
    assert first.tokens.equal(again[0].tokens) and not first.tokens.equal(second.tokens)
    assert first.loss_mask.any() and int(first.span_id.max()) == 2
    (other,) = mock_step(cfg, step=3, dp_rank=1, dp_size=2)
    assert not other.tokens.equal(first.tokens)


@pytest.mark.usefixtures("single_process")
def test_capture_splits_a_whole_step(tmp_path: Path) -> None:
    """Every range of a step is found, the split adds up to the step, and the trace holds the ranges."""
    found = capture(tiny_config(), tmp_path, Window(warm=1, steps=1), tool="torch")
    split = found["split_ms"]
    assert set(split) == {*RANGES, "other"}
    assert all(value > 0 for value in split.values()), split
    assert sum(split.values()) == pytest.approx(found["clocked_step_ms"], rel=1e-3)
    assert found["tokens_per_second"] == pytest.approx(4 * 48 / found["step_ms"]["median"] * 1e3, rel=1e-2)
    assert found["router_agg"]["moe/router_agg/experts_active_mean"] > 0
    assert found["top_operators"] and found["peak_memory_mib"] > 0
    trace = json.loads(gzip.decompress((tmp_path / "trace.json.gz").read_bytes()))
    assert set(RANGES) <= {event.get("name") for event in trace["traceEvents"]}


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
