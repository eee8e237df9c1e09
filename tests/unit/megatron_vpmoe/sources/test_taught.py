"""Answers that a teacher scores, beside an anchor: shares, resume, ranks, and what a collapse does."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.config.schema_rollouts import MODES, CurriculumPart
from megatron_vpmoe.data.batch import PADDING
from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import CheckpointError, ConfigError, DataError, VpmoeError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.objectives import OnPolicy, build_objective
from megatron_vpmoe.sources import (
    Annotated,
    Position,
    Step,
    Taught,
    Teacher,
    check_collapse,
    open_held_out,
    open_source,
)
from megatron_vpmoe.sources.curriculum import mode_of
from megatron_vpmoe.sources.form import repetition
from megatron_vpmoe.sources.prompts import Asked, FilePrompts, read_prompts
from megatron_vpmoe.training.step import global_totals, run_micro_batches
from tests.fixtures_dataset import conversation, small_dataset, write_dataset
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
FEW = {
    "objective": "on_policy",
    "teacher_weights": "runs/teacher",
    "num_layers": 2,
    "rollout_groups": 8,
    "rollout_group_size": 2,
    "global_batch_size": 8,
    "rollout_max_new_tokens": 10,
    "eval_interval": None,
}


@pytest.fixture
def model() -> VPModel:
    torch.manual_seed(3)
    return build_model(tiny_config(num_layers=2))


@pytest.fixture
def dataset(tmp_path: Path) -> KDDataset:
    return KDDataset(read_manifest(small_dataset(tmp_path / "kd", train=12, valid=4)), "train", seq_length=48)


def opened(model: VPModel, dataset: KDDataset, rank: int = 0, ranks: int = 1, **changes: Any) -> Taught:
    cfg = tiny_config(**{**FEW, **changes})
    asked = [Asked([5 + place, 9, 3], {"place": place}) for place in range(6)]
    source = Taught(asked, [Part("kd", dataset)], cfg, rank, ranks)
    source.open(model)
    return source


def documents(step: Step) -> dict[tuple[int, int], tuple[int, tuple[int, ...], tuple[float, ...]]]:
    """(Row, document) -> whether it was sampled, its tokens, what the sampler says of them."""
    found = {}
    for batch in step.batches:
        for row, number in enumerate(batch.sample_ids):
            for document in range(int(batch.document_id[row].max()) + 1):
                own = batch.document_id[row] == document
                found[number, document] = (
                    int(batch.annotations["is_sampled"][row, document]),
                    tuple(batch.tokens[row][own].tolist()),
                    tuple(batch.annotations["sampled_log_p"][row][own].tolist()),
                )
    return found


@pytest.mark.slow
def test_the_anchor_keeps_its_share_and_every_step_resumes(model: VPModel, dataset: KDDataset) -> None:
    """From within a sampling and from between two; what two ranks hold together is what one holds."""
    objective, source = OnPolicy(), opened(model, dataset, opd_anchor_share=0.3)
    steps = [source.next_step() for _ in range(6)]
    counts = [objective.counts(step.batches) for step in steps]
    anchor, sampled = (sum(one[f"tokens/{name}"] for one in counts) for name in ("anchor", "sampled"))
    assert 0 <= anchor - 0.3 / 0.7 * sampled < 48  # a row at most
    assert steps[-1].metrics["data/kd/samples"] > 0 and steps[-1].metrics["rollout/repetition"] >= 0
    assert bool(steps[0].position().arrays) and not steps[1].position().arrays
    stored = {tuple(dataset[place].tokens.tolist()) for place in range(len(dataset))}
    for step in steps:
        told = documents(step).values()
        assert sum(one[0] for one in told) == 8
        assert all((tokens in stored) != bool(of_model) for of_model, tokens, _ in told)
        assert all(any(log_p) == bool(of_model) for of_model, _, log_p in told)
    for stopped in (1, 2, 3):
        again = opened(model, dataset, opd_anchor_share=0.3)
        consumed, data, arrays = steps[stopped - 1].position()
        again.resume(Position(consumed, json.loads(json.dumps(data)), arrays), source="test")
        for step in steps[stopped:]:
            other = again.next_step()
            assert documents(other) == documents(step) and other.position()[:2] == step.position()[:2]
    apart = [opened(model, dataset, rank, 2, opd_anchor_share=0.3) for rank in range(2)]
    for step in steps[:3]:
        held = [one.next_step() for one in apart]
        assert len(held[0].batches) == len(held[1].batches)
        assert documents(held[0]) | documents(held[1]) == documents(step)


CURRICULUM = [
    {"from_share": 0.0, "low": 0.75, "medium": 0.25},
    {"from_share": 0.5, "medium": 0.5, "high": 0.5, "rollouts": 2},
]
HEADS = {"low": [11, 2], "medium": [12, 12, 2], "high": [13, 2]}


def prompt_file(folder: Path, dataset: KDDataset, heads: dict[str, list[int]] = HEADS) -> Path:
    """Prompts in the mode medium."""
    path = folder / "prompts.jsonl"
    first = {"vocabulary": dataset.manifest.tokenizer.identity(), "modes": heads}
    lines = [first, *({"ids": [12, 12, 2, 5 + place, 9], "row": {}} for place in range(6))]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


@pytest.mark.slow
def test_modes_and_rollouts_follow_the_sampled_tokens(model: VPModel, dataset: KDDataset, tmp_path: Path) -> None:
    path = prompt_file(tmp_path, dataset)
    fields = {
        **{name: value for name, value in FEW.items() if name != "rollout_group_size"},
        "curriculum": json.dumps(CURRICULUM),
        "curriculum_tokens": 240,
        "rollout_prompts": path,
    }

    def again() -> Taught:
        source = open_source([Part("kd", dataset)], tiny_config(**fields), 0, 1)
        assert isinstance(source, Taught)
        source.open(model)
        return source

    source = again()
    steps, drawn, told = [], [0], list[tuple[float, set[str]]]()
    for _ in range(8):
        steps.append(step := source.next_step())
        drawn.append(step.position().consumed_samples)
        tags = {tag.rpartition("/")[2] for tag in step.metrics if tag.startswith("rollout/tokens/")}
        told.append((step.metrics["rollout/curriculum"], tags))
        for of_model, tokens, _ in documents(step).values():
            if of_model:
                assert any(list(tokens[: len(head)]) == head for name, head in HEADS.items() if name in tags)
    assert all(tags == ({"low", "medium"} if share < 0.5 else {"medium", "high"}) for share, tags in told)
    assert 0 < sum(share < 0.5 for share, _ in told) < 8
    # Then a sampling has two answers to each prompt, and two steps of as many answers as before.
    assert sorted(set(np.diff(drawn).tolist())) == [0, 8]
    by_mode = [steps[0].metrics[f"rollout/tokens/{mode}"] for mode in ("low", "medium")]
    sampled = OnPolicy().counts(steps[0].batches)["tokens/sampled"]
    assert sum(by_mode) == sampled == steps[1].metrics["rollout/curriculum"] * 240
    for stopped in (2, 6, 7):
        other = again()
        consumed, data, arrays = steps[stopped - 1].position()
        other.resume(Position(consumed, json.loads(json.dumps(data)), arrays), source="test")
        for step in steps[stopped:]:
            assert documents(given := other.next_step()) == documents(step)
            assert given.position()[:2] == step.position()[:2]


@given(
    shares=st.lists(st.integers(0, 20), min_size=3, max_size=3).filter(any),
    first=st.integers(0, 2**40),
    count=st.integers(1, 400),
)
def test_any_stretch_of_prompts_has_the_shares(shares: list[int], first: int, count: int) -> None:
    of_mode = {mode: share / sum(shares) for mode, share in zip(MODES, shares, strict=True)}
    part = CurriculumPart.model_validate({"from_share": 0, **of_mode})
    found = Counter(mode_of(part, number) for number in range(first, first + count))
    for mode in MODES:
        assert abs(found[mode] - count * getattr(part, mode)) <= 6
        assert getattr(part, mode) or not found[mode]


def test_modes_that_a_file_does_not_know_are_refused(dataset: KDDataset, tmp_path: Path) -> None:
    def read(heads: Any, longest: int = 38, modes: tuple[str, ...] = ("low", "medium")) -> FilePrompts:
        path = prompt_file(tmp_path, dataset, heads)
        return read_prompts(path, dataset.manifest.tokenizer, longest, modes)

    prompts = read(HEADS)
    asked = prompts.in_mode(prompts[1], "high")
    assert asked.ids == [13, 2, 6, 9] and asked.mode == "high" and list(prompts[1].ids) == [12, 12, 2, 6, 9]
    assert prompts.in_mode(prompts[1], "medium") is prompts[1]
    with pytest.raises(DataError, match="does not know the reasoning modes low, medium; it knows none"):
        read({})
    with pytest.raises(DataError, match="does not know the reasoning mode low"):
        read({name: head for name, head in HEADS.items() if name != "low"})
    with pytest.raises(DataError, match="system message of no mode"):
        read({"low": [11, 2]})
    with pytest.raises(DataError, match="no modes"):
        read({"low": [99]})
    assert len(read({**HEADS, "low": [11] * 9}, longest=11)) == 6
    with pytest.raises(DataError, match="a prompt of 11 tokens, above 10"):
        read({**HEADS, "low": [11] * 9}, longest=10)
    assert len(read({**HEADS, "low": [11] * 9}, longest=5, modes=())) == 6


@pytest.mark.slow
def test_a_share_of_nothing_is_no_anchor(model: VPModel, dataset: KDDataset) -> None:
    source = opened(model, dataset, opd_anchor_share=0.0)
    step = source.next_step()
    assert all(of_model for of_model, _, _ in documents(step).values()) and "data/kd/samples" not in step.metrics
    with pytest.raises(CheckpointError, match="no rollouts"):
        opened(model, dataset).resume(Position(4, [{"name": "kd"}]), source="test")
    other = opened(model, dataset)
    other.resume(step.position(), source="test")  # from where there was none it begins
    assert OnPolicy().counts(other.next_step().batches)["tokens/anchor"] > 0


@pytest.mark.slow
def test_a_dataset_that_supervises_nothing_is_no_anchor(model: VPModel, tmp_path: Path) -> None:
    bare = [conversation(20, seed) for seed in range(4)]
    for document in bare:
        document.loss_mask[:] = 0
    root = write_dataset(tmp_path / "bare", {"train": [bare], "valid": [bare]}, seq_length=48)
    empty = KDDataset(read_manifest(root), "train", seq_length=48)
    with pytest.raises(DataError, match="no supervised token"):
        opened(model, empty).next_step()


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["sampled", "topk"])
def test_a_teacher_that_is_the_student_finds_nothing_to_teach(model: VPModel, dataset: KDDataset, loss: str) -> None:
    """Also in the routing of the sampler: the anchor's own is the router's, and its loss the same."""
    found = {}
    for replay in ("off", "replay"):
        fields = {"opd_loss": loss, "rollout_temperature": 0.8, "router_replay": replay, "micro_batch_size": 3}
        if loss == "topk":
            fields["kd_top_k"] = 5
        objective = build_objective(tiny_config(**{**FEW, **fields}))
        teacher = Teacher(5 if loss == "topk" else 0, 0.8, 50)
        teacher.open(model)
        source = Annotated(opened(model, dataset, **fields), teacher)
        assert {one.name: one.temperature for one in source.annotations}["teacher_label_log_p"] == 0.8
        batches = source.next_step().batches
        assert all(batch.annotations["teacher_label_log_p"][batch.loss_mask].all() for batch in batches)
        totals = global_totals(objective, batches)
        found[replay] = told = run_micro_batches(model, objective, batches, totals, forward_only=True)
        assert abs(told["gap/total"]) < 1e-5 and told["policy/sampler_gap"] < 1e-4
        assert abs(told["loss/policy"]) < 1e-5
    assert found["off"]["loss/anchor"] == pytest.approx(found["replay"]["loss/anchor"], rel=1e-6)


def test_what_nothing_recorded_is_not_replayed(model: VPModel, dataset: KDDataset) -> None:
    for batch in opened(model, dataset, router_replay="replay").next_step().batches:
        recorded, of_model = batch.recorded_id != PADDING, batch.per_token("is_sampled").bool()
        assert torch.equal(recorded, of_model & (batch.document_id != PADDING))
        assert not batch.annotations["routing"][~recorded].any()


def test_a_collapse_warns_or_stops() -> None:
    metrics = {"rollout/length_mean": 9.5, "rollout/repetition": 0.4, "rollout/valid_share": 0.2}
    bounds: dict[str, Any] = {"collapse_length": 9.0, "collapse_repetition": 0.5, "collapse_validity": 0.3}
    lines = check_collapse(metrics, tiny_config(**FEW, **bounds))
    assert len(lines) == 2 and "length_mean = 9.5, bound 9" in lines[0] and "valid_share = 0.2" in lines[1]
    assert check_collapse({}, tiny_config(**FEW, **bounds)) == []
    assert check_collapse({**metrics, "rollout/length_mean": 9.0}, tiny_config(**FEW, collapse_length=9.0)) == []
    with pytest.raises(VpmoeError, match="collapse") as caught:
        check_collapse(metrics, tiny_config(**FEW, **bounds, collapse="stop"))
    assert "rollouts.collapse_length" in str(caught.value) and "rollouts.collapse_validity" in str(caught.value)


def test_validity_is_asked_of_harmony_alone(model: VPModel, dataset: KDDataset) -> None:
    with pytest.raises(ConfigError, match="collapse_validity"):
        opened(model, dataset, collapse_validity=0.5)


def test_what_is_said_again_counts() -> None:
    assert repetition([1, 2, 3]) == 0 and repetition(list(range(9))) == 0
    assert repetition([7] * 11) == 1 - 1 / 8 and repetition([1, 2, 3, 4] * 2) == pytest.approx(1 - 4 / 5)


def test_held_out_answers_need_no_reward(model: VPModel, dataset: KDDataset) -> None:
    cfg = tiny_config(**{**FEW, "eval_interval": 1, "eval_iters": 1})
    held_out = open_held_out([Part("kd", dataset)], cfg.model_copy())
    assert held_out is not None
    told = held_out.measure(model)
    assert told["length_mean"] > 0 and "reward_mean" not in told and np.isfinite(list(told.values())).all()
