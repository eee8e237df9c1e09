"""``vpmoe rl-nano``: commands that their programs accept, each reading what another makes; and how targets are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from tests.unit.vpmoe.quickstart.test_plan import write_dataset
from vpmoe.commands import Command
from vpmoe.data_curation.app import app as data_app
from vpmoe.eval.app import app as eval_app
from vpmoe.quickstart.proof import QuestionProof
from vpmoe.quickstart.rl import SeedPlan, plan_of
from vpmoe.quickstart.rl_report import held_against, table
from vpmoe.quickstart.settings import QuickstartError, RlSettings, RlTargets


@pytest.fixture
def plan(tmp_path: Path, repository: Path) -> QuestionProof[RlSettings]:
    return plan_of(repository, seeds=(3, 4), work_dir=tmp_path)


def parsed(command: Command) -> dict[str, Any]:
    """Options as the command's own program reads them, without running it."""
    room, name, *words = command.words[1:]
    group: Any = typer.main.get_command({"eval": eval_app, "data": data_app}[room])
    return group.commands[name].make_context(name, words).params


def test_each_command_reads_what_another_makes(plan: QuestionProof[RlSettings]) -> None:
    one, other = (SeedPlan.of(plan, seed) for seed in plan.seeds)
    (answers, ask), (dataset, build) = one.pairs()
    asked, built = parsed(ask), parsed(build)
    work = plan.data.work
    assert asked["where"] == one.sft.run and work / asked["output_dir"] == answers.output
    assert work / built["input"] == answers.output / "pairs.jsonl" and dataset.output == work / one.dpo.dataset
    assert built["id_field"] == "synth_id" and built["seq_len"] == one.dpo.cfg.data.seq_length
    # What is held out of the pairs is what the model was not trained on.
    assert asked["valid_fraction"] == built["valid_fraction"] == plan.data.settings.dataset["valid_fraction"]
    assert one.dpo.cfg.checkpoint.load_weights == one.grpo.cfg.checkpoint.load_weights == str(one.sft.run)
    assert one.dpo.cfg.training.reference_weights == str(one.sft.run)
    assert one.grpo.dataset == one.sft.dataset == plan.data.dataset
    runs = {run.run for seed in (one, other) for run in (seed.sft, seed.grpo, seed.dpo)}
    assert len(runs) == 6 and one.answers != other.answers and one.dpo.dataset != other.dpo.dataset
    # The losses of the last validation are of every held-out pair there can be.
    cfg = one.dpo.cfg
    rows = cfg.evaluation.eval_iters * cfg.training.global_batch_size
    assert rows >= int(plan.settings.pairs["valid"]) and cfg.evaluation.eval_at_start  # type: ignore[arg-type]


def test_other_weights_are_another_training(plan: QuestionProof[RlSettings]) -> None:
    write_dataset(plan.data)
    grpo = SeedPlan.of(plan, 3).grpo
    keys = [grpo.training(start)[0].key for start in (None, {"a": {"sha256": "1"}}, {"a": {"sha256": "2"}})]
    assert keys[0] != keys[1] != keys[2]


def test_wishes_that_cannot_be(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(QuickstartError, match="no step train"):
        plan_of(repository, work_dir=tmp_path, force=("train",))
    with pytest.raises(QuickstartError, match=r"seeds \[1, 1\]"):
        plan_of(repository, work_dir=tmp_path, seeds=(1, 1))


@pytest.mark.parametrize(
    ("after", "valid", "pairs", "missed"),
    [
        (0.7, 1.0, 0.95, set()),
        (0.6, 1.0, 0.95, {"gain of exact answers by GRPO"}),
        (0.7, 0.9, 0.95, {"change of validity by GRPO"}),
        (0.7, 1.0, 0.85, {"pair accuracy by DPO"}),
    ],
)
def test_targets_hold_of_each_seed(after: float, valid: float, pairs: float, missed: set[str]) -> None:
    good = {"exact_before": 0.5, "exact_after": 0.7, "valid_before": 1.0, "valid_after": 1.0}
    of_pairs = {"exact_after": 0.5, "valid_after": 1.0, "pairs": 9}
    of_pairs |= dict.fromkeys(("pair_accuracy", "pair_accuracy_policy", "pair_accuracy_policy_before"), 0.95)
    other = {**good, "exact_after": after, "valid_after": valid}
    seeds = [
        {"seed": 1, "grpo": good, "dpo": of_pairs},
        {"seed": 2, "grpo": other, "dpo": {**of_pairs, "pair_accuracy": pairs}},
    ]
    held = held_against(RlTargets(exact_gain=0.15, validity_change=-0.005, pair_accuracy=0.9), seeds)
    assert held["met"] is (not missed)
    found = {name for name, entry in held["entries"].items() if not entry["met"]}
    assert found == {f"seed 2: {name}" for name in missed}
    assert f"| 2 | 50.0 % | {100 * after:.1f} %" in table(seeds)
