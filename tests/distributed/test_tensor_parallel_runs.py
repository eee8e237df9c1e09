"""Whole runs on tensor-parallel ranks: loop, validation, samples, and checkpoints that change the number of ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests import training_runs
from tests.fixtures_dataset import small_dataset, with_records

HALF, LAST = 2, 4
FIELDS: dict[str, object] = {
    "optimizer": "normuon",
    "adam_eps": 1e-3,
    "train_iters": LAST,
    "save_interval": HALF,
    "keep_last": 5,
    "eval_interval": LAST,
    "eval_iters": 1,
    "sample_interval": LAST,
    "sample_prompts": 2,
    "sample_max_new_tokens": 6,
    "objective": "topk_kd",
    "kd_top_k": 6,
    "kd_temperature": 2.0,
    "kd_divergence": "jsd",
}
SPLIT: dict[str, object] = {"tensor_model_parallel_size": 2, "sequence_parallel": True}


def train_on_two(run_dir: Path, dataset: Path, **changes: object) -> None:
    training_runs.train_in_workers(2, run_dir, dataset, **{**FIELDS, **SPLIT, **changes})


def train_on_one(run_dir: Path, dataset: Path, **changes: object) -> None:
    done = training_runs.train(run_dir, dataset, **{**FIELDS, **changes})
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_records(small_dataset(tmp_path_factory.mktemp("data") / "set"), 6, temperature=2.0)


@pytest.fixture(scope="module")
def on_one(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("one") / "run"
    train_on_one(run_dir, dataset)
    return run_dir


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    run_dir = tmp_path_factory.mktemp("two") / "run"
    train_on_two(run_dir, dataset)
    return run_dir


def until_half(run_dir: Path, copy: Path) -> Path:
    """The run as it was when its first checkpoint was written."""
    shutil.copytree(run_dir, copy)
    shutil.rmtree(copy / "checkpoints" / f"iter_{LAST:07d}")
    return copy


def assert_same_run(run_dir: Path, reference: Path) -> None:
    """Every metric of every step (time and memory aside), the samples, and every tensor of the last checkpoint."""
    ours, expected = (training_runs.measured(folder) for folder in (run_dir, reference))
    assert ours.keys() == expected.keys()
    assert {(LAST, "loss/total"), (LAST, "valid/loss/total"), (LAST, "moe/router_agg/mean_entropy")} <= ours.keys()
    assert {(LAST, f"{what}/attention_matrices") for what in ("grad_norm", "param_norm", "update_rms")} <= ours.keys()
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=2e-4, abs=1e-7), key
    samples = [
        [json.loads(line)["completion_ids"] for line in (folder / "samples.jsonl").read_text().splitlines()]
        for folder in (run_dir, reference)
    ]
    assert samples[0] == samples[1] and len(samples[0]) == FIELDS["sample_prompts"]
    saved, wanted = (
        training_runs.checkpoint_tensors(folder / "checkpoints" / f"iter_{LAST:07d}") for folder in (run_dir, reference)
    )
    saved, wanted = ({k: v for k, v in state.items() if not k.startswith("rng")} for state in (saved, wanted))
    assert saved.keys() == wanted.keys() and any(key.endswith("linear_tpa_a.weight_k") for key in wanted)
    for key, value in wanted.items():
        assert saved[key].shape == value.shape, key
        difference = (saved[key].double() - value.double()).abs().max()
        assert difference <= 1e-2 * value.double().abs().max() + 1e-8, f"{key}: {difference}"


def test_two_ranks_make_the_run_of_one(on_two: Path, on_one: Path) -> None:
    assert_same_run(on_two, on_one)


def test_saved_by_one_continued_by_two(on_one: Path, tmp_path: Path, dataset: Path) -> None:
    run_dir = until_half(on_one, tmp_path / "run")
    train_on_two(run_dir, dataset, resume=True)
    assert_same_run(run_dir, on_one)


def test_saved_by_two_continued_by_one(on_two: Path, on_one: Path, tmp_path: Path, dataset: Path) -> None:
    run_dir = until_half(on_two, tmp_path / "run")
    train_on_one(run_dir, dataset, resume=True)
    assert_same_run(run_dir, on_one)
