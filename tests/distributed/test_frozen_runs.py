"""Whole runs under ``train_only``: any processes train alike, resumed or not, and the rest keeps its bits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from megatron_vpmoe.errors import CheckpointError
from tests import training_runs
from tests.workers import run_workers

LAST = 4
# Layer 3 (from 0) is on the second stage, where it is the second one.
MULTIPLIERS = "[{pattern: decoder.layers.3.mlp.*, factor: 3.0}]"
CASES: dict[str, tuple[list[str], dict[str, object]]] = {
    "experts": (["*.mlp.router.weight", "*.mlp.experts.*"], {"expert_model_parallel_size": 2}),
    "shares": (["decoder.layers.3.*", "decoder.layers.0.mlp.*"], {}),
    "tensor": (
        ["*layernorm.weight", "*.mlp.shared_experts.*"],
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    ),
    "nothing on the second stage": (["embedding.*"], {"pipeline_model_parallel_size": 2}),
    "multiplied on one stage": (
        ["decoder.layers.*.mlp.*"],
        {"pipeline_model_parallel_size": 2},
    ),
    "nothing on the first stage": (["output_layer.weight"], {"pipeline_model_parallel_size": 2}),
}


def run(run_dir: Path, dataset: Path, processes: int, patterns: list[str] | None, **changes: object) -> None:
    """Train in this process, one of ``processes``."""
    from megatron_vpmoe.config import load_config
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training.loop import train

    fields = {
        "micro_batch_size": 1,
        "train_iters": LAST,
        "lr_decay_iters": LAST,
        "save_interval": 100,
        "train_only": json.dumps(patterns),
        "nproc_per_node": processes,
        "lr_multipliers": MULTIPLIERS if patterns == CASES["multiplied on one stage"][0] else None,
        **changes,
    }
    words = training_runs.command(run_dir, dataset, **fields)[3:]
    cfg = load_config(words[0], words[1:])
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    distributed.initialize(seed=cfg.training.seed, **{name: getattr(cfg.parallel, name) for name in sizes})
    train(cfg)


def run_all(folder: str, dataset: Path, processes: int) -> None:
    from megatron.core import parallel_state

    for name, (patterns, changes) in CASES.items():
        run(Path(folder) / name, dataset, processes, patterns, **(changes if processes > 1 else {}))
        parallel_state.destroy_model_parallel()
    if processes > 1:
        from megatron_vpmoe.runtime import distributed

        distributed.shutdown()


def stored(run_dir: Path, step: int = LAST) -> dict[str, torch.Tensor]:
    return training_runs.checkpoint_tensors(run_dir / "checkpoints" / f"iter_{step:07d}")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.fixtures_dataset import small_dataset  # imports megatron.core, which workers have to prepare for first

    return small_dataset(tmp_path_factory.mktemp("data") / "set", train=200)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    """Folders of one and of two processes' runs, a run a case, and ``first_step``: its weights are the initial ones,
    but for the final norm's."""
    from megatron_vpmoe.runtime import distributed

    folder = tmp_path_factory.mktemp("runs")
    for count in (1, 2):
        (folder / str(count)).mkdir()
    try:
        run_all(str(folder / "1"), dataset, 1)
        run(folder / "first_step", dataset, 1, ["decoder.final_layernorm.weight"], train_iters=1)
    finally:
        distributed.shutdown()
    run_workers(2, run_all, str(folder / "2"), dataset, 2, folder=folder)
    return folder


def stored_name(name: str) -> str:
    """Experts are stored under Megatron-Core's names for them."""
    return (
        name.replace("experts.fc", "experts.experts.linear_fc").replace("_weight", ".weight").replace("_bias", ".bias")
    )


@pytest.mark.parametrize("case", CASES)
def test_two_processes_train_what_one_does(case: str, runs: Path) -> None:
    one, two, initial = stored(runs / "1" / case), stored(runs / "2" / case), stored(runs / "first_step", 1)
    assert two.keys() == one.keys()
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, rtol=1e-3, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")

    rows = json.loads((runs / "2" / case / "assignment.json").read_text())
    assert [row["name"] for row in rows] == [
        r["name"] for r in json.loads((runs / "1" / case / "assignment.json").read_text())
    ]
    trained = {stored_name(row["name"]) for row in rows if row["optimizer"] != "frozen"}
    with_state = {key.split(".", 3)[3] for key in one if key.startswith("optimizer.state.")}
    assert with_state == trained
    moving = trained | {name.replace("router.weight", "router.expert_bias") for name in trained}
    weights = [
        key for key in initial if not key.startswith("optimizer.") and key not in ("decoder.final_layernorm.weight",)
    ]
    for state in (one, two):
        moved = {key for key in weights if key in state and not torch.equal(state[key], initial[key])}
        assert moved == moving.intersection(weights)


def test_resumed_it_is_the_same_run_and_bound_to_what_it_trains(runs: Path, tmp_path: Path, dataset: Path) -> None:
    from megatron_vpmoe.runtime import distributed

    patterns, _ = CASES["experts"]
    try:
        run(tmp_path / "run", dataset, 1, patterns, train_iters=2)
        distributed.shutdown()
        with pytest.raises(CheckpointError, match=r"training\.train_only"):
            run(tmp_path / "run", dataset, 1, patterns[:1], resume=True, allow_provenance_change=True)
        distributed.shutdown()
        run(tmp_path / "run", dataset, 1, patterns, resume=True)
    finally:
        distributed.shutdown()
    ours, straight = stored(tmp_path / "run"), stored(runs / "1" / "experts")
    assert ours.keys() == straight.keys()
    assert [key for key in straight if not torch.equal(ours[key], straight[key])] == []
