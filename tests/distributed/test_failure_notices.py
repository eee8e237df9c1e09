"""What asks two processes to save, told to one of them: SIGUSR1, a preemption notice, a budget of time."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.runtime.notices import TimeBudget
from megatron_vpmoe.training.checkpoint_files import TRACKER
from tests import training_runs
from tests.fixtures_dataset import small_dataset
from tests.training_runs import command, losses
from tests.workers import run_workers

pytestmark = pytest.mark.slow

STEPS, ASKED = 8, 3
RUN = {"train_iters": STEPS, "save_interval": 1000, "keep_last": 9, "sample_interval": None, "eval_interval": None}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set")


def asked(arguments: list[str], how: str, notice: str) -> int:
    """In its third step the second rank is sent SIGUSR1, or the notice appears; or each step takes a second."""
    from megatron_vpmoe.runtime import notices
    from megatron_vpmoe.training import loop

    train_step, steps = loop.train_step, 0
    if how == "budget" and os.environ["RANK"] == "0":
        Path(notice).write_text(str(notices.began()))

    def stepping(*given: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if how == "budget":
            time.sleep(1)
        elif steps == ASKED and os.environ["RANK"] == "1":
            if how == "signal":
                os.kill(os.getpid(), signal.SIGUSR1)
            else:
                Path(notice).touch()
        if how == "notice" and steps >= ASKED:
            time.sleep(1.2)  # it is looked for once a second
        return train_step(*given, **named)

    loop.train_step = stepping  # type: ignore[assignment]
    return training_runs.worker(arguments)


def run(run_dir: Path, dataset: Path, how: str, **changes: object) -> list[int]:
    run_dir.mkdir(exist_ok=True)
    arguments = command(run_dir, dataset, nproc_per_node=2, **{**RUN, **changes})[3:]
    return run_workers(2, asked, arguments, how, str(run_dir.parent / "notice"), folder=run_dir)


def saved(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("iter_")) for path in (run_dir / "checkpoints").glob("iter_*"))


def test_sigusr1_to_one_rank_saves_and_goes_on(dataset: Path, tmp_path: Path) -> None:
    assert run(tmp_path / "run", dataset, "signal") == [0, 0]
    assert saved(tmp_path / "run") == [ASKED, STEPS]


def test_a_preemption_notice_saves_and_ends(dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    named = {"preemption_file": tmp_path / "notice"}
    assert run(tmp_path / "run", dataset, "notice", **named) == [0, 0]
    ended = saved(tmp_path / "run")
    assert len(ended) == 1 and ASKED <= ended[0] + 1 < STEPS
    assert run(tmp_path / "run", dataset, "notice", resume=True, **named) == [2, 2]
    assert "is there before the run begins" in capfd.readouterr().err
    (tmp_path / "notice").unlink()
    assert run(tmp_path / "run", dataset, "none", resume=True, **named) == [0, 0]
    assert list(losses(tmp_path / "run")) == list(range(1, STEPS + 1))


def test_a_budget_of_time_saves_before_it_is_over(dataset: Path, tmp_path: Path) -> None:
    minutes = 0.4
    assert run(tmp_path / "run", dataset, "budget", time_budget_minutes=minutes, train_iters=1000) == [0, 0]
    assert len(saved(tmp_path / "run")) == 1
    end = float((tmp_path / "notice").read_text()) + 60 * minutes
    stood = (tmp_path / "run" / "checkpoints" / TRACKER).stat().st_mtime
    assert 0 < end - stood < 0.7 * 60 * minutes  # and it is not given away


def test_a_budget_of_one_checkpoint_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megatron_vpmoe.runtime.notices.began", time.time)
    TimeBudget(2, lambda: 60).refuse_early()
    with pytest.raises(ConfigError, match=r"60 s are left, and 90 s are kept"):
        TimeBudget(1, lambda: 60).refuse_early()
