"""Whole runs through the loop: two stages train, validate, sample and save what one process does, and go on for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from tests import training_runs
from tests.fixtures_dataset import small_dataset, with_records
from tests.workers import run_workers

HALF, LAST = 3, 6
FIELDS = {
    "micro_batch_size": 1,
    "lr_decay_iters": LAST,
    "save_interval": HALF,
    "eval_interval": HALF,
    "eval_iters": 1,
    "sample_interval": HALF,
    "sample_prompts": 2,
    "sample_max_new_tokens": 5,
    "moe_per_layer_logging": True,
    "objective": "topk_kd",
    "kd_top_k": 4,
}


def train(run_dir: Path, dataset: Path, stages: int, folder: Path, **changes: object) -> None:
    fields = {**FIELDS, **changes, "pipeline_model_parallel_size": stages, "nproc_per_node": stages}
    arguments = training_runs.command(run_dir, dataset, **fields)[3:]
    folder.mkdir()
    run_workers(stages, training_runs.work, arguments, folder=folder)


def assert_same_run(run_dir: Path, straight: Path) -> None:
    ours, theirs = (training_runs.measured(path) for path in (run_dir, straight))
    steps = {step for step, _ in ours}
    kept = {key: value for key, value in theirs.items() if key[0] in steps}
    assert kept.keys() <= ours.keys()
    assert {(LAST, tag) for tag in ("loss/total", "update_rms/output_layer", "lr/output_layer")} <= kept.keys()
    for key, value in kept.items():
        assert ours[key] == pytest.approx(value, rel=1e-5, abs=1e-7), key
    loads, expected = training_runs.expert_loads(run_dir), training_runs.expert_loads(straight)
    assert all((loads[step] == expected[step]).all() for step in (HALF, LAST))
    samples = [json.loads((path / "samples.jsonl").read_text().splitlines()[-1]) for path in (run_dir, straight)]
    assert samples[0] == samples[1]
    last = f"checkpoints/iter_{LAST:07d}"
    tensors, expected = (training_runs.checkpoint_tensors(path / last) for path in (run_dir, straight))
    assert tensors.keys() == expected.keys() and len(tensors) > 50
    for key, tensor in expected.items():
        torch.testing.assert_close(tensors[key], tensor, rtol=1e-4, atol=5e-6, msg=lambda m, k=key: f"{k}: {m}")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_records(small_dataset(tmp_path_factory.mktemp("data") / "set", train=200), 5)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    train(folder / "run", dataset, 1, folder / "results", train_iters=LAST)
    return folder / "run"


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_goes_on_at_another_number_of_stages(
    before: int, after: int, tmp_path: Path, dataset: Path, straight: Path
) -> None:
    run_dir = tmp_path / "run"
    if before == 1:
        shutil.copytree(straight, run_dir)
        shutil.rmtree(run_dir / "checkpoints" / f"iter_{LAST:07d}")
    else:
        train(run_dir, dataset, before, tmp_path / "first", train_iters=HALF)
    train(run_dir, dataset, after, tmp_path / "second", train_iters=LAST, resume=True)
    assert_same_run(run_dir, straight)
    names = [row["name"] for row in json.loads((run_dir / "assignment.json").read_text())]
    assert names == [row["name"] for row in json.loads((straight / "assignment.json").read_text())]
