"""A run that is interrupted, in any way, and resumed is the run that was not: losses and weights, bit for bit."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest
import torch

from tests import training_runs
from tests.fixtures_dataset import small_dataset

pytestmark = pytest.mark.slow
LAST = 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set", train=200)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("straight")
    done = training_runs.train(run_dir, dataset)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return training_runs.checkpoint_tensors(run_dir / "checkpoints" / f"iter_{LAST:07d}")


def assert_same_run(run_dir: Path, straight: Path) -> None:
    assert training_runs.losses(run_dir) == training_runs.losses(straight)
    ours, expected = final_state(run_dir), final_state(straight)
    assert ours.keys() == expected.keys() and len(ours) > 50
    different = [key for key in expected if not torch.equal(ours[key], expected[key])]
    assert not different


def test_the_straight_run_learns(straight: Path) -> None:
    losses = training_runs.losses(straight)
    assert list(losses) == list(range(1, LAST + 1))
    assert losses[LAST] < losses[1]


def test_terminated_and_resumed(tmp_path: Path, dataset: Path, straight: Path) -> None:
    """SIGTERM after step 7: the step is finished, a checkpoint written, exit code 0."""
    assert training_runs.train_until(7, signal.SIGTERM, tmp_path, dataset, save_interval=100) == 0
    saved = [path.name for path in (tmp_path / "checkpoints").glob("iter_*")]
    assert len(saved) == 1 and 7 <= int(saved[0].removeprefix("iter_")) < LAST
    done = training_runs.train(tmp_path, dataset, resume=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert saved[0] in done.stdout
    assert_same_run(tmp_path, straight)


def test_killed_and_resumed(tmp_path: Path, dataset: Path, straight: Path) -> None:
    """kill -9 after step 12, with checkpoints at 5 and 10: steps 11 and 12 are done again, and logged once."""
    assert training_runs.train_until(12, signal.SIGKILL, tmp_path, dataset) == -signal.SIGKILL
    done = training_runs.train(tmp_path, dataset, resume=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert_same_run(tmp_path, straight)


def test_a_damaged_checkpoint_is_named_and_passed_over(tmp_path: Path, dataset: Path, straight: Path) -> None:
    assert training_runs.train_until(12, signal.SIGKILL, tmp_path, dataset) == -signal.SIGKILL
    newest = max((tmp_path / "checkpoints").glob("iter_???????"))
    victim = max(newest.glob("*.distcp"), key=lambda path: path.stat().st_size)
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    done = training_runs.train(tmp_path, dataset, resume=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert victim.name in done.stdout and "sha256" in done.stdout
    assert_same_run(tmp_path, straight)


def test_an_existing_run_is_not_overwritten(dataset: Path, straight: Path) -> None:
    done = training_runs.train(straight, dataset)
    assert done.returncode == 2
    assert "--resume" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_experts": 16}, {"data_seed": 5}])
def test_another_geometry_or_order_is_refused(dataset: Path, straight: Path, change: dict[str, int]) -> None:
    done = training_runs.train(straight, dataset, resume=True, train_iters=LAST + 5, **change)
    assert done.returncode == 2
    assert next(iter(change)) in done.stderr and "Traceback" not in done.stderr


def test_a_killed_run_leaves_no_process_behind(tmp_path: Path, dataset: Path) -> None:
    """Megatron's checkpoint writer works in processes of its own."""
    marker = str(tmp_path)
    assert training_runs.train_until(6, signal.SIGKILL, tmp_path, dataset) == -signal.SIGKILL
    deadline = time.monotonic() + 20
    while left := training_runs.processes_with_environment("VPMOE_TEST_RUN", marker):
        assert time.monotonic() < deadline, left
        time.sleep(0.2)
