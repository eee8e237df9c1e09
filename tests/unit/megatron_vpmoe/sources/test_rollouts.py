"""Rollouts: what a step holds follows from weights and position alone, also after a stop between two updates."""

from __future__ import annotations

import json
import math
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import CheckpointError, ConfigError, DataError
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.objectives.grpo import GRPO
from megatron_vpmoe.optim import build_optimizer
from megatron_vpmoe.runtime.signals import Interrupted, StopRequest
from megatron_vpmoe.sources import HeldOut, Position, Rewarded, Step, open_held_out
from megatron_vpmoe.sources.answers import Answering
from megatron_vpmoe.sources.groups import packed, varies
from megatron_vpmoe.sources.prompts import Asked, StoredPrompts, open_prompts, read_prompts
from megatron_vpmoe.sources.rewards import Sample
from megatron_vpmoe.sources.sampling import Sampler
from megatron_vpmoe.training.step import run_micro_batches, train_step
from tests.fixtures_dataset import EOD, small_dataset
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
HERE = "test_rollouts"
REWARDS = [{"function": f"{HERE}:even"}]
ENDS = {EOD, 2, 3}
FEW = {
    "objective": "grpo",
    "rollout_groups": 4,
    "rollout_group_size": 3,
    "global_batch_size": 6,
    "rollout_max_new_tokens": 10,
}


def even(sample: Sample) -> float:
    """The share of even tokens: it differs from answer to answer."""
    return sum(token % 2 == 0 for token in sample.ids) / len(sample.ids)


def of_odd_prompts(sample: Sample) -> float:
    return even(sample) if sample.row["place"] % 2 else 0.5


def broken(sample: Sample) -> float:
    raise KeyError("answer")


def not_a_number(sample: Sample) -> float:
    return float("nan")


def too_large(sample: Sample) -> float:
    return 1.7e308


def a_text(sample: Sample) -> Any:
    return "0.5"


def greedy_hands(sample: Sample) -> Any:
    """Any number will do; and what a reward does to its sample stays with it."""
    sample.row["seen"].append(1)
    return np.float32(len(sample.row["seen"])) if len(sample.ids) % 2 else torch.ones(())


@pytest.fixture
def model() -> VPModel:
    torch.manual_seed(3)
    return build_model(tiny_config(num_layers=2))


@pytest.fixture
def dataset(tmp_path: Path) -> KDDataset:
    return KDDataset(read_manifest(small_dataset(tmp_path / "kd", train=6, valid=2)), "train", seq_length=48)


def opened(
    model: VPModel, dataset: KDDataset, *, prompts: Any = None, reward: str = "even", **changes: Any
) -> Rewarded:
    cfg = tiny_config(
        num_layers=2, rewards=[{"function": f"{HERE}:{reward}"}], **{**FEW, "eval_interval": None, **changes}
    )
    asked = [Asked([5 + place, 9, 3], {"place": place}) for place in range(8)] if prompts is None else prompts
    source = Rewarded(asked, dataset.manifest, cfg, 0, 1)
    source.open(model)
    return source


def same(one: Step, other: Step) -> None:
    assert one.position()[:2] == other.position()[:2] and len(one.batches) == len(other.batches)
    assert one.position().arrays.keys() == other.position().arrays.keys()
    assert all(
        np.array_equal(one.position().arrays[name], other.position().arrays[name]) for name in one.position().arrays
    )
    for mine, theirs in zip(one.batches, other.batches, strict=True):
        for name in ("tokens", "labels", "loss_mask", "document_id"):
            assert torch.equal(getattr(mine, name), getattr(theirs, name))
        assert all(torch.equal(mine.annotations[name], theirs.annotations[name]) for name in mine.annotations)


def test_a_step_holds_answers_with_what_is_known_of_them(model: VPModel, dataset: KDDataset) -> None:
    model.train()
    step = opened(model, dataset, rollout_groups=2, rollout_temperature=0.8).next_step()
    assert model.training
    rewards: dict[int, list[float]] = {}
    advantages: dict[int, list[float]] = {}
    for batch in step.batches:
        mask, given = batch.loss_mask, batch.annotations
        # What was sampled from is what the trainer computes, up to rounding; untempered is another distribution.
        torch.testing.assert_close(given["old_log_p"], given["sampled_log_p"], rtol=1e-4, atol=1e-4)
        assert (given["sampled_log_p"][mask] < 0).all() and not given["sampled_log_p"][~mask].any()
        assert not torch.allclose(given["sampled_log_p"][mask], given["untempered_log_p"][mask], atol=1e-3)
        documents = [(row, n) for row in range(len(mask)) for n in range(int(batch.document_id[row].max()) + 1)]
        for row, column in documents:
            answer = batch.labels[row][mask[row] & (batch.document_id[row] == column)]
            assert float(given["reward"][row, column]) == pytest.approx(float((answer % 2 == 0).double().mean()))
            group = int(given["group"][row, column])
            rewards.setdefault(group, []).append(float(given["reward"][row, column]))
            advantages.setdefault(group, []).append(float(given["advantage"][row, column]))
    assert {group: len(found) for group, found in rewards.items()} == {0: 3, 1: 3}
    for group, found in rewards.items():
        of_group = torch.tensor(found)
        wanted = (of_group - of_group.mean()) / (of_group.std() + 1e-6)
        torch.testing.assert_close(torch.tensor(advantages[group]), wanted, rtol=1e-4, atol=1e-5)
    assert step.metrics["rollout/reward_mean"] == pytest.approx(sum(map(sum, rewards.values())) / 6)
    assert step.metrics["rollout/attempts"] == 1 and step.metrics["rollout/reward/even"] > 0


ATTEMPTS = {"reward": "of_odd_prompts", "rollout_attempts": 3, "micro_batch_size": 5}


@pytest.mark.parametrize(("replay", "more"), [("off", {}), ("off", ATTEMPTS), ("replay", {})])
def test_resumed_between_two_updates_it_gives_the_same(
    model: VPModel, dataset: KDDataset, replay: str, more: dict[str, Any]
) -> None:
    """Also from other weights: what was sampled is kept, and only the next sampling is theirs."""
    source = opened(model, dataset, rollout_epochs=2, router_replay=replay, **more)
    steps = [source.next_step() for _ in range(6)]
    assert steps[0].metrics == steps[3].metrics != steps[4].metrics
    assert not steps[3].position().arrays and steps[2].position().arrays
    for stopped in range(1, 6):
        again = opened(model, dataset, rollout_epochs=2, router_replay=replay, **more)
        consumed, data, arrays = steps[stopped - 1].position()
        position = Position(consumed, json.loads(json.dumps(data)), arrays)
        again.resume(position, source="test")
        for step in steps[stopped:]:
            same(again.next_step(), step)
    replaying = opened(model, dataset, rollout_epochs=2, router_replay="replay")
    told = replaying.resume(steps[0].position(), source="test")
    assert len(told) == 1 and ("experts unknown" in told[0]) == (replay == "off")
    assert replaying.next_step().batches[0].annotations["routing"].any()


@pytest.mark.parametrize("replay", ["off", "replay"])
def test_routing_that_flips_is_replayed(
    model: VPModel, dataset: KDDataset, replay: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A sampler that sends most tokens elsewhere: another bias decides on experts there, and on nothing else."""
    biases: list[Any] = [router.expert_bias for router in model.modules() if isinstance(router, VPMoERouter)]

    def elsewhere(*arguments: Any, **keywords: Any) -> Any:
        for number, bias in enumerate(biases):
            bias.copy_(torch.rand(8, generator=torch.Generator().manual_seed(number)))
        completions = generate(*arguments, **keywords)
        for bias in biases:
            bias.zero_()
        return completions

    monkeypatch.setattr("megatron_vpmoe.sources.answers.generate", elsewhere)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter *= 4
    source = opened(model, dataset, router_replay=replay)
    step, objective = source.next_step(), GRPO(mismatch_clamp=1.1)
    totals = {name: float(value) for name, value in objective.counts(step.batches).items()}
    totals["tokens/real"] = float(sum(batch.real_tokens for batch in step.batches))
    told = run_micro_batches(model, objective, step.batches, totals, forward_only=True)
    # Either way the update begins at the old log-probabilities: both are of the same pass.
    assert told["policy/kl_old"] < 1e-10
    if replay == "replay":
        assert told["policy/sampler_gap"] < 1e-5 and told["policy/clamped_share"] == 0
    else:
        assert told["policy/sampler_gap"] > 0.05 and told["policy/clamped_share"] > 0.05


def test_a_prompt_that_comes_again_has_draws_of_its_own(model: VPModel, dataset: KDDataset) -> None:
    arrays = opened(model, dataset, prompts=[Asked([5, 9], {})]).next_step().position().arrays
    ends = np.cumsum(arrays["ids.lengths"])[:-1]
    assert len({tuple(answer.tolist()) for answer in np.split(arrays["ids"], ends)}) == len(ends) + 1 == 12


def test_groups_without_variance_make_way(model: VPModel, dataset: KDDataset) -> None:
    step = opened(model, dataset, reward="of_odd_prompts", rollout_attempts=8, global_batch_size=12).next_step()
    metrics = step.metrics
    assert metrics["rollout/attempts"] > 1 and 0 < metrics["rollout/groups_without_variance"] < 1
    assert advantages_of(step) == pytest.approx([1, 1, 1, 1], rel=1e-3)
    # Past the limit they fill up the step, and teach nothing.
    few = opened(model, dataset, reward="of_odd_prompts", rollout_attempts=1, global_batch_size=12).next_step()
    idle = few.metrics["rollout/groups_without_variance"]
    assert idle > 0 and advantages_of(few) == pytest.approx(
        [0] * round(4 * idle) + [1] * round(4 * (1 - idle)), rel=1e-3
    )


def advantages_of(step: Step) -> list[float]:
    """The standard deviation of each group's advantages, sorted."""
    groups: dict[int, list[float]] = {}
    for batch in step.batches:
        for row, documents in enumerate(batch.document_id.max(1).values.tolist()):
            for column in range(documents + 1):
                group = int(batch.annotations["group"][row, column])
                groups.setdefault(group, []).append(float(batch.annotations["advantage"][row, column]))
    return sorted(float(torch.tensor(found).std()) for found in groups.values())


def test_truncated_answers_are_left_out_where_asked(model: VPModel, dataset: KDDataset) -> None:
    step = opened(model, dataset, rollout_max_new_tokens=2, mask_truncated=True).next_step()
    assert step.metrics["rollout/truncated_share"] > 0.5
    answers = sum(int(batch.loss_mask.sum()) for batch in step.batches)
    everything = opened(model, dataset, rollout_max_new_tokens=2).next_step()
    assert answers < sum(int(batch.loss_mask.sum()) for batch in everything.batches)


@pytest.mark.parametrize(
    ("reward", "told"), [("broken", "KeyError"), ("not_a_number", "nan"), ("too_large", "1.7e"), ("a_text", "0.5")]
)
def test_a_reward_that_fails_ends_the_run_with_the_sample(
    model: VPModel, dataset: KDDataset, reward: str, told: str
) -> None:
    with pytest.raises(DataError, match=rf"(?s)reward {reward} .*{told}.*'place'"):
        opened(model, dataset, reward=reward).next_step()


def test_a_reward_changes_no_prompt(model: VPModel, dataset: KDDataset) -> None:
    asked = [Asked([5 + place, 9], {"seen": []}) for place in range(4)]
    assert opened(model, dataset, reward="greedy_hands", prompts=asked).next_step().metrics["rollout/reward_mean"] == 1
    assert not any(one.row["seen"] for one in asked)


STOP = StopRequest()


def stopping(sample: Sample) -> float:
    """Asked to stop while it scores."""
    STOP._handle(signal.SIGTERM, None)
    return even(sample)


def test_asked_to_stop_while_it_scores_it_leaves_the_sampling(model: VPModel, dataset: KDDataset) -> None:
    source, undisturbed = (opened(model, dataset, reward=reward) for reward in ("stopping", "even"))
    source.stop = STOP
    with pytest.raises(Interrupted):
        source.next_step()
    source.stop = None
    assert source.next_step().position().consumed_samples == undisturbed.next_step().position().consumed_samples


def hostile(sample: Sample) -> float:
    raise ValueError("\x1b[2J\u202e")


def test_a_message_shows_what_is_hidden_and_the_beginning_of_what_is_long(model: VPModel, dataset: KDDataset) -> None:
    row = {"place": "\u202e" * 9, "much": "x" * 100_000}
    with pytest.raises(DataError) as caught:
        opened(model, dataset, reward="hostile", prompts=[Asked([5, 9], row)] * 4).next_step()
    assert str(caught.value).isprintable() or not {"\x1b", "\u202e"} & set(str(caught.value))
    assert "2 ids [5, 9]" in str(caught.value) and len(str(caught.value)) < 4000


def test_rewards_that_differ_by_rounding_alone_teach_nothing(model: VPModel, dataset: KDDataset) -> None:
    one = Answering(dataset.manifest, tiny_config(rewards=REWARDS, **FEW, eval_interval=None).rollouts)(
        Sampler(model), [(0, Asked([5, 9], {}))], 1
    ).rollouts[0]
    assert not varies([replace(one, reward=0.1 + 0.2), replace(one, reward=0.3)])
    assert not varies([replace(one, reward=0.0), replace(one, reward=-0.0)])
    assert varies([replace(one, reward=0.3), replace(one, reward=0.3001)])


@pytest.mark.slow
def test_with_nothing_left_to_train_on_a_step_is_finite(dataset: KDDataset) -> None:
    cfg = tiny_config(num_layers=2, rewards=REWARDS, **FEW, eval_interval=None)
    model = build_model(cfg)
    wrapped = wrap_for_training(model, cfg)
    step = opened(model, dataset, rollout_max_new_tokens=1, mask_truncated=True, rollout_groups=2).next_step()
    kept = [batch for batch in step.batches if not batch.loss_mask.any()]
    assert kept
    result = train_step(wrapped, build_optimizer([wrapped], cfg), build_objective(cfg), kept)
    assert result.updated and result.metrics["loss/total"] == 0 and math.isfinite(result.grad_norm)
    assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())


def test_what_cannot_be_is_refused_by_name(model: VPModel, dataset: KDDataset) -> None:
    with pytest.raises(ConfigError, match="nowhere"):
        opened(model, dataset, reward="nowhere")
    with pytest.raises(ConfigError, match="4 x 3 answers are no whole number of steps of 8"):
        opened(model, dataset, global_batch_size=8)
    with pytest.raises(CheckpointError, match="no rollouts"):
        opened(model, dataset).resume(Position(4, [{"name": "kd"}]), source="test")


def test_a_rest_that_fits_no_more_is_sampled_anew(model: VPModel, dataset: KDDataset) -> None:
    position = opened(model, dataset).next_step().position()
    other = opened(model, dataset, global_batch_size=24, rollout_groups=8)
    assert other.resume(position, source="test") == [
        "12 sampled answers are no whole number of steps now: sampled anew"
    ]
    assert set(other.next_step().position().arrays) == set() and other.next_step().position().consumed_samples == 20


def test_every_prompt_has_to_leave_room_for_the_longest_answer(dataset: KDDataset, tmp_path: Path) -> None:
    lengths = [len(dataset[place].prompt) for place in range(len(dataset))]
    longest = max(lengths)
    assert len(open_prompts(dataset, None, longest)) == len(dataset)
    first = next(place for place, length in enumerate(lengths) if length == longest)
    with pytest.raises(DataError, match=f"{lengths.count(longest)} prompts .* {longest - 1} tokens.* {first}\n"):
        open_prompts(dataset, None, longest - 1)
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"ids": [5, 9]}\n{"ids": [5, 9, 3]}\n')
    assert [list(one.ids) for one in open_prompts(dataset, str(path), 3)] == [[5, 9], [5, 9, 3]]
    with pytest.raises(DataError, match=r"(?s)prompt of 3 tokens.*prompts\.jsonl:2"):
        open_prompts(dataset, str(path), 2)


def test_a_file_says_which_vocabulary_it_is_in(dataset: KDDataset, tmp_path: Path) -> None:
    path, identity = tmp_path / "prompts.jsonl", dataset.manifest.tokenizer.identity()
    path.write_text(json.dumps({"vocabulary": identity}) + '\n{"ids": [5, 9]}\n')
    assert len(open_prompts(dataset, str(path), 3)) == 1
    path.write_text(json.dumps({"vocabulary": {**identity, "rank_file_sha256": "0"}}) + '\n{"ids": [5, 9]}\n')
    with pytest.raises(DataError, match="vocabulary"):
        open_prompts(dataset, str(path), 3)


def test_held_out_rewards_are_those_of_training_and_disturb_nothing(
    model: VPModel, dataset: KDDataset, tmp_path: Path
) -> None:
    fields = {"num_layers": 2, "rewards": REWARDS, **FEW, "eval_interval": 2, "eval_iters": 1}
    cfg = tiny_config(**fields)
    held_out = HeldOut([Asked([7 + place, 3], {}) for place in range(20)], dataset.manifest, cfg)
    source, undisturbed = (opened(model, dataset) for _ in range(2))
    state = torch.get_rng_state()
    found = held_out.measure(model)
    same(source.next_step(), undisturbed.next_step())
    again = held_out.measure(model)
    assert torch.equal(torch.get_rng_state(), state) and model.training
    for name in found.keys() - {"seconds_sampling", "seconds_scoring"}:
        assert found[name] == again[name]
    assert found["reward_mean"] == found["reward/even"] > 0 and found["length_max"] <= 10
    path = tmp_path / "held_out.jsonl"
    path.write_text("".join(json.dumps({"ids": [7 + place, 3]}) + "\n" for place in range(20)))
    parts = [Part("kd", dataset, 0)]
    of_file = open_held_out(parts, tiny_config(**fields, rollout_valid_prompts=path))
    assert of_file is not None and of_file.measure(model)["reward_mean"] == found["reward_mean"]
    assert open_held_out(parts, tiny_config(**{**fields, "eval_interval": None})) is None
    # As many prompts as a global batch has answers, and the same answers as if they were trained on.
    prompts = [Asked([7 + place, 3], {}) for place in range(6)]
    asked = Answering(dataset.manifest, cfg.rollouts)(Sampler(model), list(enumerate(prompts)), 1)
    assert asked.metrics()["reward_mean"] == found["reward_mean"]


def test_prompts_of_a_dataset_come_with_the_stored_answer(dataset: KDDataset) -> None:
    prompts = StoredPrompts(dataset)
    for place in range(len(prompts)):
        asked = prompts[place]
        tokens, answer = dataset[place].tokens.tolist(), asked.row["answer_ids"]
        assert [*asked.ids, *answer] == tokens[: len(asked.ids) + len(answer)]
        assert answer[-1] in ENDS and not ENDS & set(answer[:-1])


@pytest.mark.parametrize("line", ["[1]", '{"ids": []}', '{"ids": [99]}', '{"ids": [true]}', '{"ids": [1], "row": 2}'])
def test_a_file_of_something_else_is_no_prompts(dataset: KDDataset, tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"ids": [1, 2], "row": {"a": 1}}\n' + line + "\n")
    with pytest.raises(DataError, match=r"prompts\.jsonl:2"):
        read_prompts(path, dataset.manifest.tokenizer, 9)


def test_rows_are_packed_without_loss() -> None:
    lengths = [5, 9, 2, 7, 7, 3]
    rows = packed(lengths, 12)
    assert sorted(place for row in rows for place in row) == list(range(6))
    assert all(sum(lengths[place] for place in row) <= 12 for row in rows) and len(rows) == 3
