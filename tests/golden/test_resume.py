"""A run that is interrupted, in any way, and resumed is the run that was not: losses and weights, bit for bit."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest
import torch

from megatron_vpmoe.training.checkpoint_files import damage
from megatron_vpmoe.training.run_directory import ownership
from tests import training_runs
from tests.fixtures_dataset import small_dataset
from tests.workers import run_workers

pytestmark = pytest.mark.slow
LAST = 20


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set", train=200)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """From the command line, in an interpreter of its own: others, with another order of hashes, are compared to it."""
    run_dir = tmp_path_factory.mktemp("straight")
    words = training_runs.command(run_dir, dataset)
    done = subprocess.run(words, env=training_runs.ENVIRONMENT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return run_dir


def final_state(run_dir: Path) -> dict[str, torch.Tensor]:
    return training_runs.checkpoint_tensors(run_dir / "checkpoints" / f"iter_{LAST:07d}")


def assert_same_run(run_dir: Path, straight: Path) -> None:
    assert training_runs.losses(run_dir) == training_runs.losses(straight)
    loads, as_straight = training_runs.expert_loads(run_dir), training_runs.expert_loads(straight)
    assert [*loads] == [*range(1, LAST + 1)]
    assert all((loads[step] == as_straight[step]).all() for step in loads)
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


def test_terminated_in_the_middle_of_a_batch(tmp_path: Path, dataset: Path) -> None:
    """The step under way is given up and done again: SIGTERM in the third of the eight micro-batches of step 2."""
    fields = {"global_batch_size": 8, "micro_batch_size": 1, "train_iters": 2, "lr_warmup_iters": 1, "save_interval": 9}
    assert training_runs.train(tmp_path / "straight", dataset, **fields).returncode == 0
    place = "megatron_vpmoe.objectives.span_ce:SpanCE.__call__"
    stopped = training_runs.train_signalled(place, 8 + 3, signal.SIGTERM, tmp_path / "run", dataset, **fields)
    assert stopped.returncode == 0, stopped.stdout + stopped.stderr
    assert [path.name for path in (tmp_path / "run" / "checkpoints").glob("iter_*")] == ["iter_0000001"]
    assert training_runs.train(tmp_path / "run", dataset, resume=True, **fields).returncode == 0
    ours, straight = (
        training_runs.checkpoint_tensors(tmp_path / name / "checkpoints" / "iter_0000002")
        for name in ("run", "straight")
    )
    assert not [key for key in straight if not torch.equal(ours[key], straight[key])]


def test_what_a_stop_leaves_unmeasured_is_made_up_for(tmp_path: Path, dataset: Path) -> None:
    """SIGTERM within the validation after the last step; then a kill within the samples behind it."""
    fields = {"train_iters": 2, "lr_warmup_iters": 1, "save_interval": 9, "eval_interval": 2, "sample_interval": 2}
    straight, run_dir = tmp_path / "straight", tmp_path / "run"
    assert training_runs.train(straight, dataset, **fields).returncode == 0
    micro_batch = "megatron_vpmoe.objectives.span_ce:SpanCE.__call__"
    stopped = training_runs.train_signalled(micro_batch, 2 * 2 + 1, signal.SIGTERM, run_dir, dataset, **fields)
    assert stopped.returncode == 0 and "stopped at step 2" in stopped.stdout, stopped.stdout + stopped.stderr
    assert "when it goes on it makes up for valid, samples" in stopped.stdout
    fields["resume"] = True
    samples = "megatron_vpmoe.training.samples:SampleWriter.write"
    assert training_runs.train_signalled(samples, 1, signal.SIGKILL, run_dir, dataset, **fields).returncode == -9
    assert (2, "valid/loss/total") in training_runs.measured(run_dir) and not (run_dir / "samples.jsonl").exists()
    done = training_runs.train(run_dir, dataset, **fields)
    assert done.returncode == 0 and "done, step 2" in done.stdout
    assert training_runs.measured(run_dir) == training_runs.measured(straight)
    places = [(record["step"], record["tag"]) for record in training_runs.records(run_dir)]
    assert len(places) == len({*places})
    assert (run_dir / "samples.jsonl").read_text() == (straight / "samples.jsonl").read_text()


def test_a_run_that_all_ranks_end_leaves_the_checkpoint_that_was_being_written(tmp_path: Path, dataset: Path) -> None:
    """Saved after step 5; step 6 is the first to be held against a limit, which it passes."""
    ended = training_runs.train(tmp_path, dataset, log_interval=6, router_max_vio_fail=1e-6)
    assert ended.returncode == 2 and "router collapse" in ended.stderr
    assert "step 5: saved" in ended.stdout and damage(tmp_path / "checkpoints" / "iter_0000005") is None


def spoil(path: Path) -> None:
    content = (path / "common.pt").read_bytes()
    (path / "common.pt").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def test_sound_checkpoints_outlive_damaged_ones_and_damaged_ones_are_no_start(tmp_path: Path, dataset: Path) -> None:
    """Of 3, 6, 9 and 12 the last two are damaged: the run goes on from 6, saves 8, and both are there."""
    checkpoints = tmp_path / "checkpoints"
    assert training_runs.train(tmp_path, dataset, train_iters=12, save_interval=3, keep_last=4).returncode == 0
    for number in (9, 12):
        spoil(checkpoints / f"iter_{number:07d}")
    done = training_runs.train(tmp_path, dataset, train_iters=8, resume=True, keep_last=2)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "step 8: saved" in done.stdout
    sound, aside = ("iter_0000006", "iter_0000008"), ("iter_0000009.damaged", "iter_0000012.damaged")
    assert sorted(path.name for path in checkpoints.glob("iter_*")) == sorted(sound + aside)

    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    for name in sound:
        spoil(checkpoints / name)
    refused = training_runs.train(tmp_path, dataset, train_iters=8, resume=True)
    assert refused.returncode == 2
    assert all(name in refused.stderr for name in sound + aside) and "Traceback" not in refused.stderr
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics
    assert sorted(path.name for path in checkpoints.glob("iter_*")) == sorted(sound + aside)


def test_a_full_disk_is_one_message_and_the_run_goes_on_with_room(tmp_path: Path, dataset: Path) -> None:
    """A limit on the size of files stands for it; the checkpoint of step 5 is written, that of step 10 is not."""
    assert training_runs.train(tmp_path, dataset, train_iters=5).returncode == 0
    leftover = tmp_path / "checkpoints" / "iter_0000003.partial"
    leftover.mkdir()
    (leftover / "__0_0.distcp").write_bytes(bytes(1000))
    command = ["bash", "-c", 'ulimit -f 200; exec "$@"', "bash"]
    store = tmp_path.parent / "runs.sqlite"  # that of all tests has grown beyond the limit
    command += training_runs.command(tmp_path, dataset, train_iters=10, resume=True, run_store=store)
    full = subprocess.run(command, env=training_runs.ENVIRONMENT, capture_output=True, text=True, check=False)
    assert full.returncode == 2
    assert full.stderr.count("cannot be written: [Errno 27] File too large") == 1 and "Traceback" not in full.stderr
    assert [path.name for path in (tmp_path / "checkpoints").glob("iter_*")] == ["iter_0000005"]
    done = training_runs.train(tmp_path, dataset, train_iters=10, resume=True)
    assert done.returncode == 0, done.stderr
    assert "iter_0000005" in done.stdout


def test_a_refusal_ends_every_rank(tmp_path: Path, dataset: Path) -> None:
    arguments = training_runs.command(tmp_path / "run", dataset, nproc_per_node=2)[3:]
    with ownership(tmp_path / "run"):
        assert run_workers(2, training_runs.worker, arguments, folder=tmp_path) == [2, 2]
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_an_existing_run_is_not_overwritten(dataset: Path, straight: Path) -> None:
    done = training_runs.train(straight, dataset)
    assert done.returncode == 2
    assert "--resume" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("change", [{"hidden_size": 64}, {"num_experts": 16}, {"data_seed": 5}])
def test_another_geometry_or_order_is_refused(dataset: Path, straight: Path, change: dict[str, int]) -> None:
    done = training_runs.train(straight, dataset, resume=True, train_iters=LAST + 5, **change)
    assert done.returncode == 2
    assert next(iter(change)) in done.stderr and "Traceback" not in done.stderr
