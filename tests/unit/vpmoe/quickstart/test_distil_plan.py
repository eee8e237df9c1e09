"""``vpmoe distil-nano``: who starts from what and learns from whom; how targets are held, and the spread of seeds."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import typer

from tests.unit.vpmoe.quickstart.test_plan import write_dataset
from vpmoe.quickstart.distil import AFTER, Students, Teaching, plan_of
from vpmoe.quickstart.distil_report import gains, held_against, table
from vpmoe.quickstart.settings import DistilTargets
from vpmoe.teacher.app import app as data_app


@pytest.fixture
def teaching(tmp_path: Path, repository: Path) -> Teaching:
    return Teaching.of(plan_of(repository, seeds=(3, 4), work_dir=tmp_path))


def test_students_take_the_same_steps_from_the_same_weights(teaching: Teaching) -> None:
    one, other = (Students.of(teaching, seed) for seed in (3, 4))
    teacher = str(teaching.run.run)
    of_texts = [one.runs[name].cfg for name in AFTER]
    assert {cfg.checkpoint.load_weights for cfg in of_texts} == {str(one.start.run)}
    # Nothing that decides their tokens differs; what is learned from does.
    assert (
        len({(cfg.data.data_seed, cfg.training.train_iters, cfg.training.global_batch_size) for cfg in of_texts}) == 1
    )
    assert len({cfg.model.model_dump_json() + cfg.optim.model_dump_json() for cfg in of_texts}) == 1
    assert [cfg.training.kd_alpha for cfg in of_texts] == [0.0, 1.0, 1.0]
    assert [cfg.training.teacher_weights for cfg in of_texts] == [None, None, teacher]
    assert [one.runs[name].dataset for name in AFTER] == [teaching.store, teaching.store, teaching.run.dataset]
    assert one.after == ("stored_topk",) and set(one.runs) == {*AFTER, "on_policy"}
    every = teaching.proof.settings.model_copy(update={"after": ["ce", "live_topk"]})
    all_three = Students.of(replace(teaching, proof=replace(teaching.proof, settings=every)), 3)
    for before, name in AFTER.items():
        cfg = all_three.runs[name].cfg
        assert cfg.training.objective == "on_policy" and cfg.training.teacher_weights == teacher
        assert cfg.checkpoint.load_weights == str(one.runs[before].run)
    assert teaching.run.cfg.model.ffn_hidden_size != one.start.cfg.model.ffn_hidden_size
    places = [run.run for each in (one, other) for run in (each.start, *each.runs.values())]
    assert len(set(places)) == len(places)


def test_the_store_is_asked_of_the_teacher(teaching: Teaching) -> None:
    step, command = teaching.scoring()
    group: Any = typer.main.get_command(data_app)
    read = group.commands["score"].make_context("score", list(command.words[3:])).params
    assert read["teacher"] == str(teaching.run.run) and read["dataset"] == teaching.run.dataset
    assert step.output == teaching.run.work / teaching.store and read["top_k"] == 64


def test_another_teacher_is_another_evaluation(teaching: Teaching) -> None:
    write_dataset(teaching.proof.data)
    run, teacher = Students.of(teaching, 3).start, teaching.run
    (run.work / run.rows).mkdir(parents=True, exist_ok=True)
    (run.work / run.rows / "test.jsonl").write_text("questions")
    asked = [None, (teacher, {"a": {"sha256": "1"}}), (teacher, {"a": {"sha256": "2"}})]
    made = [run.evaluating({"b": {"sha256": "3"}}, each) for each in asked]
    keys = [step.key for step, _ in made]
    assert all(one != other for one, other in combinations(keys, 2))
    assert ["--teacher" in command.words for _, command in made] == [False, True, True]


def student(exact: float, kl: float, **more: float) -> dict[str, float]:
    return {"exact": exact, "valid": 1.0, "kl_to_teacher": kl, "kl_top_k": kl, "steps": 80, "tokens": 1000, **more}


def a_seed(seed: int, ce: float, stored: float, policy: float, after: float) -> dict[str, Any]:
    students = {"ce": student(ce, 0.04), "stored_topk": student(stored, 0.03), "live_topk": student(stored, 0.03)}
    return {"seed": seed, "students": {**students, "on_policy": student(policy, 0.02, gap_before=0.1, gap_after=after)}}


@pytest.mark.parametrize(
    ("stored", "policy", "after", "missed"),
    [
        (0.5, 0.6, 0.05, set()),
        (0.41, 0.6, 0.05, {"exact answers, stored top K above CE"}),
        (0.5, 0.5, 0.05, {"exact answers gained on-policy"}),
        (0.5, 0.6, 0.09, {"gap closed on-policy"}),
    ],
)
def test_targets_hold_of_each_seed(stored: float, policy: float, after: float, missed: set[str]) -> None:
    targets = DistilTargets(
        teacher_exact=0.9,
        stored_over_ce_exact=0.05,
        stored_over_ce_kl=0.1,
        top_k_share_of_kl=0.98,
        on_policy_exact_gain=0.02,
        on_policy_gap_fall=0.2,
    )
    seeds = [a_seed(1, 0.4, 0.5, 0.6, 0.05), a_seed(2, 0.4, stored, policy, after)]
    held = held_against(targets, {"exact": 0.95}, seeds)
    assert {name for name, entry in held["entries"].items() if not entry["met"]} == {
        f"seed 2: {each}" for each in missed
    }
    assert held["met"] is (not missed)
    assert not held_against(targets, {"exact": 0.85}, seeds)["entries"]["teacher: exact answers"]["met"]
    assert f"| 2 | on_policy | {100 * policy:.1f} %" in table(seeds) and f"| 0.1000 | {after:.4f} |" in table(seeds)


def test_gains_are_seed_by_seed_and_held_against_their_spread() -> None:
    apart = gains([a_seed(1, 0.3, 0.5, 0.6, 0.05), a_seed(2, 0.4, 0.55, 0.6, 0.05)])
    assert apart is not None and apart["exact"]["each"] == pytest.approx([0.2, 0.15])
    assert apart["exact"]["mean"] == pytest.approx(0.175)
    assert apart["exact"]["beyond"] and apart["kl_to_teacher"]["mean"] == pytest.approx(0.01)
    crossed = gains([a_seed(1, 0.3, 0.4, 0.6, 0.05), a_seed(2, 0.5, 0.45, 0.6, 0.05)])
    assert crossed is not None and not crossed["exact"]["beyond"]
    assert gains([a_seed(1, 0.3, 0.5, 0.6, 0.05)]) is None
