"""An objective of another package: named in the configuration, it trains, keeps its state and is refused by name."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.errors import CheckpointError, ConfigError, DataError
from megatron_vpmoe.objectives import OBJECTIVES, Needs, build_objective
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.sources import Reference, StoredSource, ahead, check_needs
from megatron_vpmoe.training import run as run_module
from megatron_vpmoe.training.loop import train
from tests.fixtures_dataset import small_dataset
from tests.tiny import tiny_config
from tests.training_runs import losses, records

TOY = '''
"""Likelihood with a bonus on entropy that falls with the step, weighed by a running mean of the loss."""
from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.objectives import Needs, Objective, ObjectiveResult

EVENTS = []


class Toy(Objective):
    def __init__(self):
        self.step, self.mean = 0, 0.0

    def begin_step(self, step):
        self.step = step
        EVENTS.append(f"begin {step}")

    def end_step(self, metrics):
        self.mean = 0.5 * self.mean + 0.5 * metrics["loss/total"]
        EVENTS.append(f"end {self.step}")

    def state(self):
        return {"mean": self.mean}

    def restore(self, state):
        self.mean = state["mean"]

    def counts(self, batches):
        return {"tokens/supervised": sum(int(batch.loss_mask.sum()) for batch in batches)}

    def __call__(self, output, batch, totals):
        log_p, entropy = output.log_probabilities(batch.labels, batch.loss_mask, entropy=True)
        bonus = (0.01 + 0.1 * self.mean) / (1 + self.step)
        loss = -(log_p + bonus * entropy).sum() / max(totals["tokens/supervised"], 1.0)
        return ObjectiveResult(loss, {"loss/total": loss.detach()})


class Anchored(Toy):
    """Likelihood, held to a frozen model."""
    needs = Needs(annotations=(Annotation(name="reference_log_p", dtype="float32"),))

    def __call__(self, output, batch, totals):
        log_p, _ = output.log_probabilities(batch.labels, batch.loss_mask)
        apart = (log_p - batch.annotations["reference_log_p"][batch.loss_mask]).square().sum()
        share = 1 / max(totals["tokens/supervised"], 1.0)
        loss = (apart - log_p.sum()) * share
        return ObjectiveResult(loss, {"loss/total": loss.detach(), "kl/apart": apart.detach() * share})


class OfPairs(Toy):
    needs = Needs(pairs=True)


NOT_ONE = 3
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    (tmp_path / "toy_objective.py").write_text(TOY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "toy_objective", raising=False)
    import toy_objective  # type: ignore[import-not-found]

    return toy_objective


def config(tmp_path: Path, run: str, **changes: object):
    data = tmp_path / "set"
    if not data.exists():
        small_dataset(data)
    fields = {
        "objective": "toy_objective:Toy",
        "train_iters": 4,
        "save_interval": 2,
        "num_layers": 2,
        "log_interval": 1,
        "eval_interval": None,
        **changes,
    }
    return tiny_config(data_path=data, run_dir=tmp_path / run, **fields)


def trained(cfg: Any) -> Any:
    with distributed.single_process(seed=1234):
        return train(cfg)


@pytest.mark.slow
def test_it_trains_and_goes_on_with_its_state(toy: Any, tmp_path: Path) -> None:
    straight = trained(config(tmp_path, "straight"))
    assert [f"{what} {step}" for step in range(1, 5) for what in ("begin", "end")] == toy.EVENTS
    trained(config(tmp_path, "resumed", train_iters=2, lr_decay_iters=4))
    resumed = trained(config(tmp_path, "resumed", resume=True, lr_decay_iters=4))
    assert resumed.restored_from is not None
    assert losses(tmp_path / "resumed") == losses(tmp_path / "straight")
    assert resumed.objective.state() == straight.objective.state() != {"mean": 0.0}


@pytest.mark.slow
def test_a_frozen_model_annotates_batches_before_the_update(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trained(config(tmp_path, "first", train_iters=1, lr_warmup_iters=0))
    weights = str(first.directory)
    how = {"objective": "toy_objective:Anchored", "train_iters": 3, "load_weights": weights}
    held = trained(config(tmp_path, "held", reference_weights=weights, eval_interval=3, **how))
    apart = {r["step"]: r["value"] for r in records(tmp_path / "held") if r["tag"] == "kl/apart"}
    assert apart[1] < 1e-9 < 1e-7 < apart[3]  # the same weights at first; the reference stays where it was
    assert any(r["tag"] == "valid/kl/apart" for r in records(tmp_path / "held"))
    assert any("reference_log_p from" in note for note in held.notes)

    passes, annotate = [], Reference.__call__

    def asked_to_stop(self: Reference, batch: Any) -> Any:
        passes.append(os.kill(os.getpid(), signal.SIGTERM))
        return annotate(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Reference, "__call__", asked_to_stop)
        many = {"global_batch_size": 20, "micro_batch_size": 1, "eval_at_start": True}
        stopped = trained(config(tmp_path, "stopped", reference_weights=weights, **how, **many))
    assert (stopped.iteration, len(passes)) == (0, 1)

    monkeypatch.setattr(run_module, "build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ConfigError, match="Anchored needs the annotation 'reference_log_p'"):
        trained(config(tmp_path, "none", **how))
    with pytest.raises(CheckpointError, match=r"model\.num_layers: 2 -> 4") as caught:
        trained(config(tmp_path, "other", **how | {"load_weights": None}, reference_weights=weights, num_layers=4))
    assert "training.reference_weights" in str(caught.value)
    sampled = {"rewards": [{"function": "finished"}], "rollout_max_new_tokens": 12, "reference_weights": weights}
    with pytest.raises(CheckpointError, match=r"model\.num_layers: 2 -> 4"):
        trained(config(tmp_path, "grpo", objective="grpo", num_layers=4, **sampled))
    # It is computed at the temperature of sampling, and this objective reads it at 1.
    with pytest.raises(ConfigError, match=r"reference_log_p' as .*temperature=1\.0; it is .*temperature=0\.7"):
        trained(config(tmp_path, "warm", **how | {"load_weights": None}, rollout_temperature=0.7, **sampled))


@pytest.mark.usefixtures("single_process")
def test_a_source_that_depends_on_the_weights_is_asked_after_each_update(
    toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Rollouts(StoredSource):
        depends_on_weights = True

        def next_step(self):
            toy.EVENTS.append("give")
            return super().next_step()

    def open_rollouts(*arguments: Any):
        source = Rollouts(*arguments)
        assert ahead(source) is source
        return source

    monkeypatch.setattr(run_module, "open_source", open_rollouts)
    train(config(tmp_path, "rollouts"))
    assert [event for step in range(1, 5) for event in ("give", f"begin {step}", f"end {step}")] == toy.EVENTS


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("toy_objective:Other", "cannot be had.*Other"),
        ("no_such_module:Toy", "cannot be had.*no_such_module"),
        ("toy_objective:NOT_ONE", "is no objective: 3"),
    ],
)
def test_what_cannot_be_one_is_refused(toy: Any, tmp_path: Path, name: str, what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        build_objective(config(tmp_path, "none", objective=name))


@pytest.mark.parametrize("name", ["spam_ce", "toy_objective", "toy_objective:", "a b:c"])
def test_a_name_that_is_none_is_refused_with_those_that_are(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=r"must be .*, grpo, .* or module:Class") as caught:
        tiny_config(objective=name)
    assert all(known in str(caught.value) for known in OBJECTIVES)


@pytest.mark.usefixtures("single_process")
def test_needs_are_checked_before_any_weight(toy: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(DataError, match="OfPairs reads harmony_preference"):
        train(config(tmp_path, "pairs", objective="toy_objective:OfPairs"))
    toy.Toy.needs = Needs(experts=True)
    with pytest.raises(ConfigError, match="needs a model with routed experts"):
        build_objective(config(tmp_path, "dense", num_experts=None))


def test_each_missing_need_is_named() -> None:
    class Gives:
        annotations = (
            Annotation(name="teacher_ids", dtype="int32", width=8),
            Annotation(name="teacher_log_p", dtype="float32", width=8, temperature=2.0),
            Annotation(name="reward", dtype="float32", per="document"),
        )
        depends_on_weights = False

    wanted = (
        Annotation(name="teacher_ids", dtype="int32"),
        Annotation(name="reward", dtype="float32"),
        Annotation(name="advantage", dtype="float32", per="document"),
    )
    check_needs("mine", Needs(annotations=wanted[:1]), Gives(), source="train")
    log_p = Annotation(name="teacher_log_p", dtype="float32", width=8, temperature=2.0)
    check_needs("mine", Needs(annotations=(log_p.model_copy(update={"width": 4}),)), Gives(), source="train")
    for change in ({"width": 9}, {"temperature": 1.0}):
        with pytest.raises(ConfigError, match=f"teacher_log_p' as .*{'='.join(map(str, *change.items()))}"):
            check_needs("mine", Needs(annotations=(log_p.model_copy(update=change),)), Gives(), source="train")
    with pytest.raises(ConfigError) as caught:
        check_needs("mine", Needs(annotations=wanted, depends_on_weights=True), Gives(), source="train")
    said = str(caught.value)
    assert "the objective mine needs" in said and "train" in said
    assert "'advantage'" in said and "'reward' as" in said and "teacher_ids" not in said
    assert "samples of the model that is trained" in said
