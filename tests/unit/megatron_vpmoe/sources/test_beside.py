"""Samplings beside the updates: by the weights of k updates before, whatever the clock, and nothing crosses over."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Completion, Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model import recompute
from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.optim import build_optimizer
from megatron_vpmoe.runtime.signals import Interrupted
from megatron_vpmoe.sources import Annotated, Beside, Position, Rewarded, Rollouts, Step, Taught, Teacher
from megatron_vpmoe.sources.prompts import Asked
from megatron_vpmoe.sources.reference import log_p_of_labels
from megatron_vpmoe.sources.rewards import Sample
from megatron_vpmoe.sources.sampling import Reached, Sampler, Sampling
from megatron_vpmoe.training.checkpoint import rng_state
from megatron_vpmoe.training.step import global_totals, run_micro_batches, train_step
from tests.fixtures_dataset import small_dataset
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
HERE = "test_beside"
FEW = {
    "num_layers": 2,
    "rewards": json.dumps([{"function": f"{HERE}:scored"}]),
    "rollout_groups": 4,
    "rollout_group_size": 2,
    "global_batch_size": 8,
    "rollout_max_new_tokens": 8,
    "router_replay": "replay",
    "eval_interval": None,
}
TAUGHT = {"objective": "on_policy", "teacher_weights": "runs/teacher", "opd_anchor_share": 0.3}
FOR_ONE = {**TAUGHT, "rollout_staleness": 1}  # a sampling serves one update
FOR_FOUR = {"objective": "grpo", "global_batch_size": 4, "rollout_epochs": 2, "rollout_staleness": 2}
ON_SCORE: list[Any] = []


def scored(sample: Sample) -> float:
    for act in ON_SCORE:
        act()
    return sum(token % 2 == 0 for token in sample.ids) / len(sample.ids)


@pytest.fixture(autouse=True)
def nothing_on_score() -> Iterator[None]:
    ON_SCORE.clear()
    yield
    ON_SCORE.clear()


@pytest.fixture
def dataset(tmp_path: Path) -> KDDataset:
    return KDDataset(read_manifest(small_dataset(tmp_path / "kd", train=12, valid=4)), "train", seq_length=48)


def model_at(version: int) -> VPModel:
    """The model with the weights that stand after so many updates; any weights do here."""
    model = build_model(tiny_config(num_layers=2))
    move(model, version)
    return model


@torch.no_grad()
def move(model: VPModel, version: int) -> None:
    generator = torch.Generator().manual_seed(version)
    for weights in (*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("expert_bias"))):
        weights.copy_(torch.randn(weights.shape, generator=generator) * 0.3)


def opened(model: VPModel, dataset: KDDataset, fields: dict[str, Any]) -> Rollouts:
    cfg = tiny_config(**{**FEW, **fields})
    asked = [Asked([5 + place, 9, 3], {"place": place}) for place in range(6)]
    if cfg.training.objective == "on_policy":
        source: Rollouts = Taught(asked, [Part("kd", dataset)], cfg, 0, 1)
    else:
        source = Rewarded(asked, dataset.manifest, cfg, 0, 1)
    source.open(model, Beside(model, model_at(-1), 1) if cfg.rollouts.rollout_staleness else None)
    return source


def same(step: Step, other: Step) -> None:
    assert step.position()[:2] == other.position()[:2]
    for mine, theirs in zip(step.batches, other.batches, strict=True):
        assert torch.equal(mine.tokens, theirs.tokens) and torch.equal(mine.loss_mask, theirs.loss_mask)
        assert all(torch.equal(mine.annotations[name], theirs.annotations[name]) for name in mine.annotations)
    mine, theirs = step.position().arrays, other.position().arrays
    assert mine.keys() == theirs.keys() and all(np.array_equal(mine[name], theirs[name]) for name in mine)


@pytest.mark.parametrize("fields", [FOR_ONE, FOR_FOUR], ids=["on_policy", "grpo"])
def test_every_sampling_is_of_the_weights_of_k_updates_before(dataset: KDDataset, fields: dict[str, Any]) -> None:
    """As one in between would make it of them; and a run goes on from any position to the same."""
    ahead, served = fields["rollout_staleness"], 1 if fields is FOR_ONE else 4
    model = model_at(0)
    with closing(opened(model, dataset, fields)) as source:
        steps = []
        for update in range(1, 7):
            steps.append(source.next_step())
            move(model, update)
        positions = [step.position() for step in steps]
        in_between, expected = opened(model, dataset, {**fields, "rollout_staleness": 0}), list[Sampling]()
        for number in range(3 if served == 1 else 2):
            version = max(0, number * served - ahead)
            begin = expected[-1].reached if expected else Reached()
            expected.append(in_between._sample(begin, Sampler(model_at(version), version)))
            assert set(expected[-1].arrays["weight_version"].tolist()) == {version}
        for done, (step, position) in enumerate(zip(steps, positions, strict=True)):
            sampling, use = divmod(done, served)
            assert step.metrics["rollout/staleness"] == (ahead if sampling else 0) + use
            assert step.metrics["rollout/seconds_waiting"] >= 0
            kept = {name.removeprefix("next."): a for name, a in position.arrays.items() if name.startswith("next.")}
            assert bool(kept) == (use >= served - ahead)
            if kept and sampling + 1 < len(expected):
                after = expected[sampling + 1]
                assert all(np.array_equal(kept[name], array) for name, array in after.arrays.items())
                assert position.consumed_samples == after.reached.drawn
    for stopped in (3, 4):
        model = model_at(stopped)
        with closing(opened(model, dataset, fields)) as again:
            consumed, data, arrays = positions[stopped - 1]
            notes = again.resume(Position(consumed, json.loads(json.dumps(data)), arrays), source="test")
            assert len(notes) == (stopped % served > 0) + ((stopped - 1) % served >= served - ahead)
            for update, step in enumerate(steps[stopped:5], stopped + 1):
                same(again.next_step(), step)
                move(model, update)


def test_answers_that_are_dropped_are_behind_the_position_that_counts_them(dataset: KDDataset) -> None:
    """Those of the sampling ahead too: no prompt that a rollback names as passed over comes again, nor by a resume."""
    model = model_at(0)
    with closing(opened(model, dataset, FOR_FOUR)) as source, closing(opened(model, dataset, FOR_FOUR)) as resumed:
        position = [source.next_step() for _ in range(3)][-1].position()
        assert any(name.startswith("next.") for name in position.arrays)
        consumed, data, arrays = position
        resumed.resume(Position(consumed, json.loads(json.dumps(data)), arrays), source="test")
        for each in (source, resumed):
            each.forget()
        step = source.next_step()
        same(resumed.next_step(), step)
        assert step.position().arrays["group"].min() == position.consumed_samples


def test_the_weight_of_a_stale_token_is_by_the_sampler_that_drew_it(dataset: KDDataset) -> None:
    fields = {**FOR_ONE, "opd_anchor_share": 0.0, "router_replay": "off", "opd_clamp": 1.5}
    model, teacher = model_at(0), Teacher(0, 1.0, 50)
    teacher.open(model_at(9))
    objective = build_objective(tiny_config(**{**FEW, **fields}))
    with closing(Annotated(opened(model, dataset, fields), teacher)) as source:
        source.next_step()
        move(model, 1)
        batches = source.next_step().batches
    totals = global_totals(objective, batches)
    told = run_micro_batches(model, objective, batches, totals, forward_only=True)
    cost, clamped, tokens = 0.0, 0.0, 0
    for batch in batches:
        mask = batch.loss_mask
        now, stale, taught = (log_p_of_labels(model_at(n).eval(), batch)[mask].double() for n in (1, 0, 9))
        torch.testing.assert_close(batch.annotations["sampled_log_p"][mask].double(), stale, rtol=1e-4, atol=1e-4)
        weight = (now - stale).exp()
        cost += float((weight.clamp(max=1.5) * (now - taught)).sum())
        clamped, tokens = clamped + float((weight > 1.5).sum()), tokens + int(mask.sum())
    assert told["loss/policy"] == pytest.approx(cost / tokens, rel=1e-3)
    assert 0 < clamped / tokens < 1 and told["policy/clamped_share"] == pytest.approx(clamped / tokens, abs=0.02)


def test_updates_and_samplings_leave_each_other_alone() -> None:
    """A model that recomputes and counts trains to the same bits while another thread samples, which draws the same."""
    fields = {"num_layers": 2, "recompute_granularity": "full", "moe_router_bias_update_rate": 0.01}
    cfg, options = tiny_config(**fields), SamplingOptions(8, (), temperature=1.0, samples=2)
    batches, objective = [random_batch(2, 48, 64, seed=1)], build_objective(cfg)

    def answers(model: VPModel) -> list[Completion]:
        return generate(model, [Prompt([5, 9, 3], 1), Prompt([7], 2)], options, record_routing=True)

    def trained(*, beside: bool) -> tuple[dict[str, torch.Tensor], list[list[Completion]]]:
        torch.manual_seed(5)
        model = build_model(cfg)
        expected, drawn, over = answers(model), list[list[Completion]](), False

        def sample(by: Sampler) -> float:
            while not over or len(drawn) < 2:
                assert not recompute.is_recomputing() and not by.model.training
                drawn.append(answers(by.model))
            return float(torch.tensor(1e-40) * 1)

        aside = Beside(model, build_model(cfg), 1)
        sampling = aside.begin(sample, 0) if beside else None
        wrapped = wrap_for_training(model, cfg)
        optimizer, before = build_optimizer([wrapped], cfg), rng_state()["cpu"]
        try:
            for _ in range(2):
                train_step(wrapped, optimizer, objective, batches)
        finally:
            over = True
        if sampling is not None:
            assert sampling() == float(torch.tensor(1e-40) * 1)  # what is too small is flushed on either thread
        aside.close()
        assert model.training and torch.equal(rng_state()["cpu"], before)
        return dict(model.state_dict()), [expected, *drawn]

    alone, _ = trained(beside=False)
    together, (expected, *drawn) = trained(beside=True)
    for name, weights in alone.items():
        assert not isinstance(weights, torch.Tensor) or torch.equal(together[name], weights), name
    for found in drawn:
        for one, other in zip(found, expected, strict=True):
            assert (one.ids, one.as_sampled, one.untempered) == (other.ids, other.as_sampled, other.untempered)
            assert np.array_equal(np.concatenate(one.routing), np.concatenate(other.routing))
    with recompute._running({}, again=True), ThreadPoolExecutor(1) as other_thread:
        assert recompute.is_recomputing() and not other_thread.submit(recompute.is_recomputing).result()


def test_a_fault_of_the_thread_is_raised_where_its_answers_are_needed(dataset: KDDataset) -> None:
    with closing(opened(model_at(0), dataset, FOR_FOUR)) as source:
        for _ in range(2):
            source.next_step()
        ON_SCORE.append(lambda: 1 / 0)
        step = source.next_step()  # begins the next sampling, which is needed after one more
        source.next_step()
        for needed in (step.position, source.next_step):
            with pytest.raises(DataError, match="reward scored failed with ZeroDivisionError"):
                needed()


def test_closed_within_a_sampling_it_leaves_it(dataset: KDDataset) -> None:
    source = opened(model_at(0), dataset, FOR_ONE)
    aside = source._beside
    assert aside is not None

    def wait() -> None:
        while threading.current_thread() is not threading.main_thread() and not aside.is_requested():
            time.sleep(0.001)

    ON_SCORE.append(wait)
    step = source.next_step()
    source.close()
    with pytest.raises(Interrupted):
        step.position()
