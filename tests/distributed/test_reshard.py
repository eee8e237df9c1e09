"""A run that is saved under one layout and continued under another is the run that kept to one.

State that no step has changed is the same bit for bit however it is shared out; a trajectory is the same up to the
order of fp32 sums. Saved and continued means everything: weights, masters, moments, router biases, step counts,
schedule, order of the data, answers being trained on, what the objective carries.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch

from megatron_vpmoe.config import check_world, load_config
from megatron_vpmoe.errors import VpmoeError
from megatron_vpmoe.objectives import ObjectiveResult, SpanCE
from megatron_vpmoe.training.elapsed import TOKENS
from megatron_vpmoe.training.run_directory import restorable
from tests import training_runs
from tests.fixtures_dataset import small_dataset, with_records
from tests.golden.test_resume_grpo import SAMPLED, TAUGHT, told, with_teacher
from tests.workers import run_workers

pytestmark = pytest.mark.slow

HALF, BACK, LAST = 2, 4, 5
"""Steps after which a layout takes over, and one process again."""
ENDINGS = ("eval_interval", "sample_interval")
"""What is done at the end of a run, and not before."""
EVERY_PROMPT = 2
SLICES = "unequal slices"
LAYOUTS: dict[str, dict[str, object]] = {
    "one": {},
    "data": {"nproc_per_node": 2},
    # Over four ranks the experts of one stack are shared out: over two, each has whole stacks.
    SLICES: {"nproc_per_node": 4, "overlap_grad_reduce": False},
    "experts": {"nproc_per_node": 2, "expert_model_parallel_size": 2},
    "matrices": {"nproc_per_node": 2, "tensor_model_parallel_size": 2, "sequence_parallel": True},
    "stages": {"nproc_per_node": 2, "pipeline_model_parallel_size": 2},
    "matrices, experts and data": {
        "nproc_per_node": 4,
        "tensor_model_parallel_size": 2,
        "sequence_parallel": True,
        "expert_model_parallel_size": 2,
    },
    "stages and data": {"nproc_per_node": 4, "pipeline_model_parallel_size": 2},
}
EVERY_RUN: dict[str, object] = {
    "micro_batch_size": 1,
    "adam_eps": 1e-3,  # Adam turns the sign of a rounding error into a full update otherwise
    "train_iters": LAST,
    "lr_decay_iters": LAST,
    "save_interval": HALF,
    "keep_last": 9,
}
OF_STORED: dict[str, object] = {
    **EVERY_RUN,
    "data_path": None,
    "eval_interval": LAST,
    "eval_iters": 1,
    "sample_interval": LAST,
    "sample_prompts": EVERY_PROMPT,
    "sample_max_new_tokens": 6,
    "moe_per_layer_logging": True,
    # From within the second step on other weights.
    "blend_schedule": "[{from_sample: 6, weights: [1, 3]}]",
}
FAMILIES: dict[str, dict[str, object]] = {
    "carrying": {**OF_STORED, "objective": f"{__name__}:Carrying"},
    "distilled": {**OF_STORED, "objective": "topk_kd", "kd_top_k": 6, "kd_temperature": 2.0, "kd_divergence": "jsd"},
    # Two steps a sampling and epoch: half way there are answers that are still to be trained on.
    "grpo": {**SAMPLED, **EVERY_RUN, "eval_interval": LAST, "eval_iters": 1},
    "on_policy": {**TAUGHT, **EVERY_RUN, "opd_loss": "topk", "kd_top_k": 8},
}
TRAJECTORIES = [
    ("carrying", "data"),
    ("carrying", SLICES),
    ("carrying", "experts"),
    ("distilled", "matrices"),
    ("distilled", "stages"),
    ("grpo", "data"),
    ("grpo", "experts"),
    ("grpo", "matrices"),
    ("on_policy", "data"),
]
# Each from the one before it; the last is the first.
WAY_ROUND = {
    "carrying": [*LAYOUTS, "one"],
    "grpo": ["one", "data", "one"],
}


@dataclass(frozen=True)
class Carrying(SpanCE):
    """Its weights follow from the losses so far; before each step it draws from every generator, as no part may."""

    carried: dict[str, float] = field(default_factory=lambda: {"mean": 1.0})

    def begin_step(self, step: int) -> None:
        """Leave no generator as it was."""
        torch.rand(step), np.random.random(step), random.random()

    def end_step(self, metrics: dict[str, float]) -> None:
        """Remember."""
        self.carried["mean"] = 0.5 * self.carried["mean"] + 0.5 * metrics["loss/total"]

    def state(self) -> dict[str, Any]:
        """What was remembered."""
        return dict(self.carried)

    def restore(self, state: dict[str, Any]) -> None:
        """Remember again."""
        self.carried.update(state)

    def __call__(self, output: Any, batch: Any, totals: dict[str, float]) -> ObjectiveResult:
        """SpanCE's, times what was remembered."""
        plain = super().__call__(output, batch, totals)
        loss = self.carried["mean"] * plain.loss
        return ObjectiveResult(loss, {**plain.metrics, "loss/carried": loss.detach()})


class Runs:
    """The runs of one family: a dataset, the run of one process from beginning to end, and others beside it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.family, self.folder = family, folder
        if family in ("carrying", "distilled"):
            sizes, listed = {"sums": 60, "facts": 120}, []
            for name, size in sizes.items():
                made = small_dataset(folder / name, train=size)
                with_records(made, 6, temperature=2.0)
                listed.append(f"{{path: {made}, weight: 1}}")
            self.fields = {**FAMILIES[family], "blend": f"[{', '.join(listed)}]"}
            self.dataset = folder
        else:
            self.dataset = small_dataset(folder / "kd", train=12, valid=4)
            self.fields = with_teacher(folder, self.dataset, FAMILIES[family])
        self.straight = folder / "straight"
        self.go(self.straight, "one")

    def arguments(self, run_dir: Path, layout: str, **changes: object) -> list[str]:
        return training_runs.command(run_dir, self.dataset, **{**self.fields, **LAYOUTS[layout], **changes})[3:]

    def go(self, run_dir: Path, layout: str, **changes: object) -> None:
        """Train under a layout."""
        self._in_workers(layout, _train, self.arguments(run_dir, layout, **changes), run_dir)

    def save_again(self, run_dir: Path, layout: str, target: Path) -> None:
        """Load what a run has under a layout, and save it from there."""
        arguments = self.arguments(run_dir, layout, resume=True, train_iters=LAST + 1)
        self._in_workers(layout, _save_again, arguments, run_dir, target)

    def _in_workers(
        self, layout: str, target: Callable[..., Any], arguments: list[str], run_dir: Path, *more: Path
    ) -> None:
        results = run_dir.with_name(f"{run_dir.name}.results")
        results.mkdir(parents=True, exist_ok=True)
        ranks = int(str(LAYOUTS[layout].get("nproc_per_node", 1)))
        run_workers(ranks, target, layout == SLICES, arguments, *map(str, more), folder=results)


def _train(unequal: bool, arguments: list[str]) -> None:
    from megatron_vpmoe.config import slices

    with mock.patch.object(slices, "_MOST", 0 if unequal else slices._MOST):
        training_runs.work(arguments)


def _save_again(unequal: bool, arguments: list[str], target: str) -> None:
    from megatron_vpmoe.config import slices
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training.run import open_run

    cfg = load_config(arguments[0], arguments[1:])
    sizes = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size")
    with mock.patch.object(slices, "_MOST", 0 if unequal else slices._MOST):
        distributed.initialize(seed=99, **{name: getattr(cfg.parallel, name) for name in sizes})
        run = open_run(cfg)
        run.directory = Path(target)
        run.save()
        run.settle()
        run.source.close()
        distributed.shutdown()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Runs]:
    """The runs of a family, made once."""
    made: dict[str, Runs] = {}

    def of(family: str) -> Runs:
        if family not in made:
            made[family] = Runs(family, tmp_path_factory.mktemp(family))
        return made[family]

    return of


def checkpoint(run_dir: Path, iteration: int) -> Path:
    return run_dir / "checkpoints" / f"iter_{iteration:07d}"


def until_half(straight: Path, copy: Path) -> Path:
    """The run as it was when its first checkpoint was written."""
    shutil.copytree(straight, copy)
    for step in (BACK, LAST):
        shutil.rmtree(checkpoint(copy, step))
    return copy


def whole_state(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], dict[str, np.ndarray]]:
    """Tensors, everything else that is to go on (all of run_state.json and common.pt but layout, origin), arrays."""
    state = json.loads((path / "run_state.json").read_text())
    common = torch.load(path / "common.pt", weights_only=True)
    rest = {name: state[name] for name in state if name not in ("config", "provenance", "world_size", "elapsed")}
    rest["tokens"] = state["elapsed"][TOKENS]
    rest["common"] = {name: common[name] for name in common if name != "content_metadata"}
    arrays = training_runs.sampled(path) if (path / "position.npz").exists() else {}
    return training_runs.checkpoint_tensors(path), rest, arrays


@pytest.mark.parametrize("family", WAY_ROUND)
def test_state_is_the_same_under_every_layout(family: str, runs: Callable[[str], Runs], tmp_path: Path) -> None:
    """Loaded and saved again, all the way round; nothing is lost on the way, and nothing rounded."""
    every = runs(family)
    here = until_half(every.straight, tmp_path / "0")
    tensors, rest, arrays = whole_state(checkpoint(here, HALF))
    assert {"optimizer.state.momentum_buffer", "optimizer.state.second_moment", "optimizer.state.exp_avg_sq"} <= {
        key.rsplit(".decoder")[0].rsplit(".embedding")[0] for key in tensors
    }
    assert any(key.endswith("expert_bias") and value.any() for key, value in tensors.items())
    for number, layout in enumerate(WAY_ROUND[family], 1):
        there = tmp_path / str(number)
        every.save_again(here, layout, there)
        saved, told_besides, kept = whole_state(checkpoint(there, HALF))
        assert saved.keys() == tensors.keys(), layout
        assert not [key for key in tensors if not torch.equal(saved[key], tensors[key])], layout
        assert told_besides == rest, layout
        assert kept.keys() == arrays.keys() and all(np.array_equal(kept[name], arrays[name]) for name in arrays)
        here = there


@pytest.mark.parametrize(("family", "layout"), TRAJECTORIES, ids=[", ".join(case) for case in TRAJECTORIES])
def test_a_run_goes_on_under_another_layout(
    family: str, layout: str, runs: Callable[[str], Runs], tmp_path: Path
) -> None:
    """From one process to a layout, two steps there, and back to one process."""
    every = runs(family)
    run_dir = until_half(every.straight, tmp_path / "run")
    without = {name: None for name in ENDINGS if name in every.fields}
    every.go(run_dir, layout, resume=True, train_iters=BACK, **without)
    every.go(run_dir, "one", resume=True)
    assert_same_run(run_dir, every.straight, sampled=family in ("grpo", "on_policy"))


def assert_same_run(run_dir: Path, straight: Path, *, sampled: bool) -> None:
    """Every metric of every step but for time and memory, loads, samples, assignment, and the state at the end."""
    if sampled:
        ours, expected = ({entry[:2]: entry[2] for entry in told(folder)} for folder in (run_dir, straight))
    else:
        ours, expected = (training_runs.measured(folder) for folder in (run_dir, straight))
        answers = [(folder / "samples.jsonl").read_text() for folder in (run_dir, straight)]
        assert answers[0] == answers[1] and answers[0].count("\n") == EVERY_PROMPT
    assert ours.keys() == expected.keys() and {step for step, _ in expected} == set(range(1, LAST + 1))
    for key, value in expected.items():
        assert ours[key] == pytest.approx(value, rel=1e-3, abs=1e-5), key
    loads, wanted_loads = (training_runs.expert_loads(folder) for folder in (run_dir, straight))
    assert loads.keys() == wanted_loads.keys() and all((loads[step] == wanted_loads[step]).all() for step in loads)
    rules = [json.loads((folder / "assignment.json").read_text()) for folder in (run_dir, straight)]
    assert [row["name"] for row in rules[0]] == [row["name"] for row in rules[1]]
    (saved, rest, _), (wanted, told_besides, _) = (
        whole_state(checkpoint(folder, LAST)) for folder in (run_dir, straight)
    )
    assert rest.keys() == told_besides.keys()
    assert [rest[name] for name in ("data", "tokens", "common")] == [
        told_besides[name] for name in ("data", "tokens", "common")
    ]
    assert saved.keys() == wanted.keys()
    for key, value in wanted.items():
        assert saved[key].shape == value.shape, key
        difference = (saved[key].double() - value.double()).abs().max()
        # A bias moves by a constant, or not: at all or not at all.
        bound = 0.0 if key.endswith("expert_bias") else 1e-2 * value.double().abs().max() + 1e-8
        assert difference <= bound, f"{key}: {difference}"


REFUSED: dict[str, tuple[str, dict[str, object], str]] = {
    "rows": ("carrying", {**LAYOUTS["data"], "micro_batch_size": 4}, "not a multiple of 4 x 2 data-parallel ranks"),
    "stages and matrices": (
        "carrying",
        {**LAYOUTS["matrices"], "pipeline_model_parallel_size": 2, "nproc_per_node": 4},
        "together with tensor_model_parallel_size",
    ),
    "answers over stages": ("grpo", LAYOUTS["stages"], "not computed over stages"),
    "answers beside, over experts": ("on_policy", LAYOUTS["experts"], "rollout_staleness"),
    "experts": ("carrying", {"nproc_per_node": 3, "expert_model_parallel_size": 3}, "cannot be spread evenly over 3"),
    "heads": (
        "carrying",
        {**LAYOUTS["matrices"], "tensor_model_parallel_size": 3, "nproc_per_node": 3},
        "split evenly",
    ),
    "order": ("carrying", {**LAYOUTS["data"], "data_seed": 5}, "data.data_seed: 1234 -> 5"),
    "batch": ("carrying", {**LAYOUTS["data"], "global_batch_size": 8}, "training.global_batch_size: 4 -> 8"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_is_refused_before_a_weight_is_loaded(case: str, runs: Callable[[str], Runs]) -> None:
    """No process group is there yet, nor a model."""
    family, changes, said = REFUSED[case]
    every = runs(family)
    with pytest.raises(VpmoeError) as caught:
        arguments = every.arguments(every.straight, "one", **changes, resume=True)
        cfg = load_config(arguments[0], arguments[1:])
        check_world(cfg, cfg.parallel.nproc_per_node)
        restorable(cfg)
    assert said in str(caught.value) and not torch.distributed.is_initialized()
