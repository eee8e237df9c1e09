"""Spikes of the loss and numbers that are not finite, in runs over rows that are bad: what each policy does."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

from megatron_vpmoe.training import failure_policy
from megatron_vpmoe.training.checkpoint_files import damage
from megatron_vpmoe.training.spikes import Spikes
from tests import training_runs
from tests.fixtures_dataset import small_dataset
from tests.golden.test_resume_grpo import SAMPLED
from tests.training_runs import checkpoint_tensors, command, losses, records, sampled
from tests.workers import Started, run_workers
from vpmoe.runs.registry import list_runs

pytestmark = pytest.mark.slow

STEPS, BAD_STEP, SAVED = 14, 10, 4
BAD = range((BAD_STEP - 1) * 4, BAD_STEP * 4)
"""Rows of one step, of four."""
WATCHED = {
    "train_iters": STEPS,
    "save_interval": SAVED,
    "keep_last": 9,
    "spike_window": 8,
    "spike_history": 4,
    "spike_threshold": 8.0,
    "sample_interval": None,
    "eval_interval": None,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set")


def spoil(passed_over: int, bad: range) -> None:
    """Labels that the model has learnt are never the answer, in the bad rows; and a resumed run passes rows over."""
    from megatron_vpmoe.sources import stored

    micro_batch, resume = stored._Rows.micro_batch, stored.StoredSource.resume

    def spoilt(self: Any, begin: int, end: int) -> Any:
        batch = micro_batch(self, begin, end)
        rows = torch.tensor([sample in bad for sample in batch.sample_ids])
        batch.labels[rows] = 63
        return batch

    def further(self: Any, position: Any, **named: Any) -> Any:
        notes = resume(self, position, **named)
        self.consumed_samples += passed_over
        return notes

    stored._Rows.micro_batch, stored.StoredSource.resume = spoilt, further  # type: ignore[method-assign]


def spoilt_worker(arguments: list[str], passed_over: int, bad: range) -> int:
    spoil(passed_over, bad)
    return training_runs.worker(arguments)


def train(
    run_dir: Path, dataset: Path, *, ranks: int = 1, passed_over: int = 0, bad: range = BAD, **changes: object
) -> list[int]:
    """Exit codes of a run over the bad rows."""
    arguments = command(run_dir, dataset, nproc_per_node=ranks, **{**WATCHED, **changes})[3:]
    run_dir.mkdir(parents=True, exist_ok=True)
    return run_workers(ranks, spoilt_worker, arguments, passed_over, bad, folder=run_dir)


def of_tag(run_dir: Path, tag: str) -> dict[int, float]:
    return {record["step"]: float(record["value"]) for record in records(run_dir) if record["tag"] == tag}


def state(run_dir: Path, step: int) -> dict[str, Any]:
    return json.loads((run_dir / "checkpoints" / f"iter_{step:07d}" / "run_state.json").read_text())


def equal(one: Path, other: Path, step: int = STEPS) -> bool:
    tensors = [checkpoint_tensors(run / "checkpoints" / f"iter_{step:07d}") for run in (one, other)]
    return tensors[0].keys() == tensors[1].keys() and all(
        torch.equal(tensors[0][key], tensors[1][key]) for key in tensors[0]
    )


def test_a_rollback_is_the_checkpoint_with_the_data_after_the_spike(dataset: Path, tmp_path: Path) -> None:
    back, moved, resumed = (tmp_path / name for name in ("back", "moved", "resumed"))
    acting = {"spike_policy": "rollback", "spike_limit": 2}
    assert train(back, dataset, ranks=2, **acting) == [0, 0]
    first = 8  # the checkpoint before the spike
    assert of_tag(back, "spike/action") == {first + 1: 4.0} and of_tag(back, "spike/from_step") == {first + 1: BAD_STEP}
    assert list(losses(back)) == list(range(1, STEPS + 1))  # each step once
    at_end = state(back, STEPS)
    assert at_end["spikes"]["passed_over"] == [[4 * first, 4 * BAD_STEP]] and at_end["spikes"]["acted"] == 1
    assert at_end["consumed_samples"] == 4 * STEPS + 4 * (BAD_STEP - first)
    said = json.loads((back / f"spike_{BAD_STEP:07d}_rank1.json").read_text())
    assert (
        said["action"] == "rollback" and set(said["sample_ids"]) < set(BAD) and said["z"] > WATCHED["spike_threshold"]
    )

    def copied(run: Path, step: int) -> None:
        shutil.copytree(back / "checkpoints" / f"iter_{step:07d}", run / "checkpoints" / f"iter_{step:07d}")

    copied(moved, first)
    assert train(moved, dataset, ranks=2, passed_over=4 * (BAD_STEP - first), resume=True, **acting) == [0, 0]
    assert equal(back, moved)
    places = of_tag(back, "elapsed/tokens")
    assert {step: place for step, place in places.items() if step > first} == of_tag(moved, "elapsed/tokens")
    copied(resumed, 12)  # after the rollback: the row behind, the losses, and the count go on
    assert train(resumed, dataset, ranks=2, resume=True, **acting) == [0, 0]
    assert equal(back, resumed) and state(resumed, STEPS)["spikes"] == at_end["spikes"]


TWICE = range(BAD.start, BAD.stop + 4)
"""The first step after a rollback is bad as well."""
TO_AN_OLDER = {"spike_policy": "rollback", "spike_limit": 2, "keep_last": 2}


def killed_worker(arguments: list[str], owner: str, place: str, count: int) -> NoReturn:
    """Killed before the ``count``-th call of a function."""
    spoil(0, TWICE)
    called_on: Any = failure_policy if owner == "failure_policy" else Spikes
    whole, calls = getattr(called_on, place), 0

    def called(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == count:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*given)

    setattr(called_on, place, called)
    training_runs._run(arguments)


def checkpoints(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").glob("iter_*"))


def test_a_checkpoint_that_led_to_a_spike_again_makes_way_for_an_older_one(dataset: Path, tmp_path: Path) -> None:
    """Renamed and whole; and a run that is killed within its rollbacks goes on to the same, bit for bit."""
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    assert train(straight, dataset, bad=TWICE, **TO_AN_OLDER) == [0]
    kept = ["iter_0000008.rolled_back", "iter_0000012", "iter_0000014"]  # of two that stay one is set aside
    assert checkpoints(straight) == kept
    assert damage(straight / "checkpoints" / kept[0], check_hashes=True) is None
    at_end = state(straight, STEPS)
    assert at_end["spikes"]["passed_over"] == [[32, 40], [16, 44]] and at_end["spikes"]["acted"] == 2
    assert at_end["consumed_samples"] == 44 + 4 * (STEPS - 4)
    assert of_tag(straight, "spike/from_step") == {5: 9} and list(losses(straight)) == list(range(1, STEPS + 1))
    names = {path.name for path in straight.glob("spike_*")}
    assert names == {"spike_0000010_rank0.json", "spike_0000009_rank0_2.json"}

    arguments = command(killed, dataset, **{**WATCHED, **TO_AN_OLDER, "resume": True})[3:]
    for owner, place, count, left in (
        ("failure_policy", "write_tracker", 1, ["iter_0000004", "iter_0000008"]),
        ("failure_policy", "set_aside", 1, ["iter_0000004", "iter_0000008"]),
        ("spikes", "back", 2, ["iter_0000004", "iter_0000008.rolled_back"]),
    ):
        done = Started(killed_worker, arguments, owner, place, count, environment={}).finish()
        assert done.returncode == -signal.SIGKILL and checkpoints(killed) == left
    assert train(killed, dataset, bad=TWICE, resume=True, **TO_AN_OLDER) == [0]
    # Nothing is lost of the ones set aside, and what it was resumed from stays.
    assert checkpoints(killed) == ["iter_0000004", kept[0], f"{kept[0]}.2", *kept[1:]]
    assert equal(straight, killed) and losses(straight) == losses(killed)
    assert state(killed, STEPS)["spikes"] == at_end["spikes"]


def test_a_run_goes_back_so_often_and_no_more(dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """One checkpoint is kept, and it is gone back to twice."""
    acting = {"spike_policy": "rollback", "spike_limit": 2, "keep_last": 1, "run_store": tmp_path / "runs.sqlite"}
    assert train(tmp_path, dataset, bad=range(BAD.start, 10**6), **acting) == [2]
    said = capfd.readouterr().err
    assert "SpikeError: the loss of step 9" in said and "after 2 rollbacks (failure.spike_limit 2)" in said
    assert "spike_0000009_rank0_3.json" in said and of_tag(tmp_path, "spike/action") == {9: 3.0}
    assert checkpoints(tmp_path) == ["iter_0000008"]
    (run,) = list_runs(tmp_path / "runs.sqlite")
    assert run.status == "failed" and "after 2 rollbacks" in str(run.error)


def test_a_dropped_step_moves_nothing_and_a_warning_everything(dataset: Path, tmp_path: Path) -> None:
    saved = {"off": BAD_STEP - 1, "warn": STEPS, "skip": 1}
    runs = {policy: tmp_path / policy for policy in saved}
    for policy, run_dir in runs.items():
        limit = 1 if policy == "skip" else 0
        assert train(run_dir, dataset, save_interval=saved[policy], spike_policy=policy, spike_limit=limit) == [0]
    assert equal(runs["off"], runs["warn"]) and not equal(runs["off"], runs["skip"])
    assert equal(runs["off"], runs["skip"], BAD_STEP - 1)
    weights = [checkpoint_tensors(runs["skip"] / "checkpoints" / f"iter_{n:07d}") for n in (BAD_STEP - 1, BAD_STEP)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0] if key.startswith("model."))
    actions = {policy: of_tag(run_dir, "spike/action") for policy, run_dir in runs.items()}
    assert actions == {"off": {}, "warn": {BAD_STEP: 1.0}, "skip": {BAD_STEP: 2.0}}
    assert state(runs["skip"], STEPS)["consumed_samples"] == 4 * STEPS
    places = [of_tag(run_dir, "elapsed/tokens") for run_dir in runs.values()]
    assert places[0] == places[1] == places[2] and len(set(places[0].values())) == STEPS  # each step its own


def test_a_spike_ends_the_run_by_name(dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert train(tmp_path / "run", dataset, spike_policy="stop") == [2]
    said = capfd.readouterr().err
    assert f"SpikeError: the loss of step {BAD_STEP}" in said and f"spike_{BAD_STEP:07d}_rank0.json" in said
    assert of_tag(tmp_path / "run", "spike/action") == {BAD_STEP: 3.0}
    assert math.isfinite(losses(tmp_path / "run")[BAD_STEP - 1]) and BAD_STEP not in losses(tmp_path / "run")


def overflowing(arguments: list[str], where: str) -> int:
    """A module of the last layer but one overflows, forward or backward, in the third step and on one rank."""
    import os

    from megatron_vpmoe.training import loop

    train_step, steps = loop.train_step, 0

    def infinite(_module: Any, _given: Any, output: Any) -> Any:
        parts = list(output) if isinstance(output, tuple) else [output]
        if where == "output":
            parts[0] = parts[0] * math.inf
        elif parts[0].requires_grad:
            parts[0] = parts[0].clone()
            parts[0].register_hook(lambda gradient: gradient * math.inf)
        return tuple(parts) if isinstance(output, tuple) else parts[0]

    def stepping(wrapped: Any, *given: Any, **named: Any) -> Any:
        nonlocal steps
        steps += 1
        if steps == 3 and os.environ["RANK"] == "1":
            wrapped.module.decoder.layers[2].mlp.register_forward_hook(infinite, prepend=True)
        return train_step(wrapped, *given, **named)

    loop.train_step = stepping  # type: ignore[assignment]
    return training_runs.worker(arguments)


@pytest.mark.parametrize(
    ("where", "module"),
    [
        ("output", "the output of decoder.layers.2.mlp"),
        ("gradient", "the gradient of the output of decoder.layers.2.mlp"),
    ],
)
def test_what_is_not_finite_is_named_with_its_module(
    dataset: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], where: str, module: str
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    arguments = command(run_dir, dataset, nproc_per_node=2, **{**WATCHED, "train_iters": 5})[3:]
    assert run_workers(2, overflowing, arguments, where, folder=run_dir) == [2, 2]
    names = [json.loads((run_dir / f"nonfinite_0000003_rank{rank}.json").read_text())["module"] for rank in (0, 1)]
    assert names == [module] * 2
    assert f"of iteration 3 is not finite, first in {module}" in capfd.readouterr().err


def spiking(arguments: list[str], at: int) -> int:
    """The loss of the ``at``-th step that is done is a spike; of answers no data would make one of themselves."""
    accepts, steps = Spikes.accepts, 0

    def accepting(self: Spikes, loss: float) -> bool:
        nonlocal steps
        steps += 1
        return accepts(self, loss + 100 * (steps == at))

    Spikes.accepts = accepting  # type: ignore[method-assign]
    return training_runs.worker(arguments)


def test_a_rollback_of_rollouts_answers_the_next_prompts_anew(dataset: Path, tmp_path: Path) -> None:
    """From the first step of a sampling, of 4 each, to within the one before: the three that are left are not done."""
    fields = {**SAMPLED, "spike_policy": "rollback", "spike_limit": 1, "spike_window": 8, "spike_history": 4}
    fields |= {"spike_threshold": 8.0, "async_save": True}
    whole, resumed, saved, spike = tmp_path / "whole", tmp_path / "resumed", 3, 5  # saved every 3 steps
    whole.mkdir()
    assert run_workers(1, spiking, command(whole, dataset, **fields)[3:], spike, folder=whole) == [0]
    assert of_tag(whole, "spike/from_step") == {saved + 1: spike} and list(losses(whole)) == list(range(1, 11))
    before, after = (sampled(whole / "checkpoints" / f"iter_{step:07d}") for step in (saved, 2 * saved))
    [(first, last)] = state(whole, 10)["spikes"]["passed_over"]
    assert before["group"].max() < state(whole, saved)["consumed_samples"] == first < last <= after["group"].min()
    assert len(set(after["weight_version"].tolist())) == 1

    checkpoint = whole / "checkpoints" / f"iter_{2 * saved:07d}"
    shutil.copytree(checkpoint, resumed / "checkpoints" / checkpoint.name)
    assert train(resumed, dataset, **{**fields, "resume": True}) == [0]
    assert equal(whole, resumed, 10) and state(resumed, 10)["spikes"] == state(whole, 10)["spikes"]
