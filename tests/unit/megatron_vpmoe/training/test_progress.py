"""The progress line: what it shows, and that it shows it once."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from megatron_vpmoe.training.progress import Progress, duration, losses, step_line
from megatron_vpmoe.training.saving import Saving
from tests.tiny import tiny_config

VALUES = {
    "loss/total": 2.5,
    "loss/analysis": 1.5,
    "loss/final": 1.0,
    "grad_norm": 0.5,
    "lr": 3e-3,
    "throughput/tokens_per_second": 15234.0,
    "moe/router_agg/mean_cv_pct": 31.4,
    "something/else": 1.0,
}


def test_the_line_of_a_step():
    assert step_line(7, 120, VALUES, 200.0) == (
        "step   7/120  loss 2.5000 (analysis 1.5000, final 1.0000)  15.2k tok/s  lr 3.00e-03  grad 0.5  router cv 31%  "
        "eta 3m20s"
    )


def test_what_is_not_there_is_not_shown():
    assert step_line(7, 9, {"loss/total": 1.0}, None) == "step 7/9  loss 1.0000"
    assert step_line(7, 9, {"loss/total": 1.0, "rollout/reward_mean": 0.5}, None).endswith("  reward 0.5000")
    assert losses({}) == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.4, "0s"), (59.4, "59s"), (200, "3m20s"), (7500, "2h05m"), (273600, "3d04h")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text


def test_a_log_gets_plain_lines_with_a_running_estimate():
    stream, now = io.StringIO(), [0.0]
    progress = Progress(tiny_config(train_iters=100), start=10, stream=stream, clock=lambda: now[0])
    now[0] = 20.0
    progress.step(20, VALUES)  # 2 s a step, 80 to go
    progress.note("router: [bold]2 experts[/bold]")
    progress.evaluated(20, {"loss/total": 2.0, "rewards/margin": 0.25, "accuracy/relative": 0.75})
    progress.evaluated(20, {"reward_mean": 0.25, "reward/exact": 0.25, "length_mean": 9.0})
    progress.saved(cast(Saving, SimpleNamespace(iteration=20, path=Path("runs/x"), waited=0.31, seconds=2.0)))
    progress.finished(20, stopped="asked to stop")
    lines = stream.getvalue().splitlines()
    assert lines[0].startswith("step  20/100  loss 2.5000") and lines[0].endswith("eta 2m40s")
    assert lines[1] == "router: [bold]2 experts[/bold]"
    assert lines[2] == "step 20: validation loss 2.0000  margin 0.250  preferred 75%"
    assert lines[3] == "step 20: validation reward_mean 0.2500, reward/exact 0.2500"
    assert lines[4] == "step 20: saved runs/x  (training waited 0.3 of 2.0 s)"
    assert "stopped at step 20 (asked to stop); --resume continues" in lines[5]
    assert "\x1b" not in stream.getvalue()


def test_other_ranks_are_silent():
    stream = io.StringIO()
    progress = Progress(tiny_config(), enabled=False, stream=stream)
    progress.step(1, VALUES)
    progress.note("x")
    progress.finished(1, stopped=None)
    assert stream.getvalue() == ""
