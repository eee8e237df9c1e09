"""A worker that watches itself: what it makes of having been held, and until when it watches."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests import training_runs
from tests.fixtures_dataset import small_dataset
from tests.workers import Started

pytestmark = pytest.mark.slow

HELD = """
import os, signal, time
from megatron_vpmoe.runtime import pulse

pulse._SECONDS_OF_GRACE, pulse._SECONDS_BETWEEN_LOOKS = 0.5, 0.1
pulse.begin(0, None)
with pulse.watched(3):
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.5)
    before = time.process_time()
    time.sleep(1)
    print(time.process_time() - before, flush=True)
    time.sleep(30)
"""


def test_held_for_a_while_it_goes_on_watching() -> None:
    words = [sys.executable, "-c", HELD]
    worker = subprocess.Popen(words, env=training_runs.ENVIRONMENT, stdout=-1, stderr=-1, text=True)
    deadline = time.monotonic() + 60
    while psutil.Process(worker.pid).status() != psutil.STATUS_STOPPED:
        assert worker.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    time.sleep(1)
    os.kill(worker.pid, signal.SIGCONT)
    seconds, said = worker.communicate(timeout=60)
    assert float(seconds) < 0.5  # of the processor, in one of doing nothing
    assert worker.returncode == 1 and "no sign of life for 3 s" in said and "File " in said


def _hangs(arguments: list[str], when: str) -> int:
    from megatron_vpmoe.config import RunConfig
    from megatron_vpmoe.runtime import pulse
    from megatron_vpmoe.sources.stored import StoredSource
    from megatron_vpmoe.training import run

    if when == "starts":
        RunConfig.startup_timeout = 4.0  # type: ignore[assignment]  # minutes, by the configuration
        run.build_model = lambda cfg: time.sleep(200)  # type: ignore[assignment]
    else:
        StoredSource.close = lambda self: time.sleep(200)  # type: ignore[method-assign]
    pulse.begin(0, None)
    return training_runs.worker(arguments)


@pytest.mark.parametrize("when", ["starts", "closes"])
def test_a_run_is_watched_from_its_configuration_until_all_is_closed(tmp_path: Path, when: str) -> None:
    dataset = small_dataset(tmp_path / "set")
    arguments = training_runs.command(tmp_path / "run", dataset, train_iters=3, stall_timeout_seconds=5)[3:]
    ended = Started(_hangs, arguments, when, environment={}).finish(timeout=120)
    assert ended.returncode == 1 and "no sign of life for" in ended.stderr and "in _hangs" in ended.stderr
    assert (tmp_path / "run" / "metrics.jsonl").exists() == (when == "closes")
