"""Suites during training: they leave no trace in the weights, say what the commands say, and are refused in time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vpmoe.config import load_config
from megatron_vpmoe.errors import ConfigError, DataError, TokenizerError, VpmoeError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training import run as run_module
from megatron_vpmoe.training.loop import train
from megatron_vpmoe.training.suites import open_suites
from megatron_vpmoe.training.throughput import Throughput
from tests.fixtures_dataset import small_dataset
from tests.mini_dataset import PADDED_VOCAB, SEQ_LENGTH
from tests.suites_in_training import canaries_suite, core8_suite
from tests.tiny import tiny_config
from tests.tiny_core_bundle import write_bundle
from tests.training_runs import checkpoint_tensors, losses, records
from vpmoe.cli import main

HERE = "tests.suites_in_training"


def trained(data: Path, run: Path, **changes: object) -> Any:
    fields = {"train_iters": 4, "save_interval": 2, "log_interval": 1, "eval_interval": None, "lr_decay_iters": 4}
    fields |= {"padded_vocab_size": PADDED_VOCAB, "seq_length": SEQ_LENGTH, "num_layers": 2}
    cfg = tiny_config(data_path=data / "dataset", run_dir=run, **{**fields, **changes})
    with distributed.single_process(seed=cfg.training.seed):
        return train(cfg)


def measured(run: Path, step: int) -> dict[str, float]:
    return {r["tag"]: r["value"] for r in records(run) if r["tag"].startswith("eval/") and r["step"] == step}


def same_weights(one: Path, other: Path) -> None:
    ours, theirs = (checkpoint_tensors(run / "checkpoints" / "iter_0000004") for run in (one, other))
    assert ours.keys() == theirs.keys() and len(ours) > 50
    assert not [name for name in theirs if not torch.equal(ours[name], theirs[name])]
    assert losses(one) == losses(other)


@pytest.mark.slow
def test_a_run_is_the_same_bit_for_bit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without suites, with them, stopped within one and resumed; and their numbers are those of the commands."""
    bundle, dataset = write_bundle(tmp_path / "bundle"), data / "dataset"
    core8, canaries = core8_suite(tmp_path, bundle), canaries_suite(tmp_path)
    text = {"suite": "text", "interval": 4, "items": 3, "name": "held_out", "options": {"data_path": str(dataset)}}
    restless = {"suite": f"{HERE}:restless", "interval": 1}
    events: list[str] = []
    for name in ("restart", "updating"):
        method = getattr(Throughput, name)
        monkeypatch.setattr(
            Throughput, name, lambda self, name=name, method=method: (events.append(name), method(self))[1]
        )
    plain = trained(data, tmp_path / "plain")
    events.clear()
    trained(data, tmp_path / "with", eval_suites=[core8, canaries, text, restless], eval_at_start=True)
    assert events == ["restart", "updating"] * 4 + ["restart"], "the clock begins anew after the suites"
    said = capsys.readouterr().out
    assert "step 4: core8 core8_centered_mean" in said and "step 4: held_out analysis/nats_per_token" in said
    same_weights(tmp_path / "with", tmp_path / "plain")
    assert plain.model.training

    steps = {name: [s for s in range(5) if f"eval/{name}/seconds" in measured(tmp_path / "with", s)] for name in LABELS}
    assert steps == {"core8": [0, 2, 4], "canaries": [0, 2, 4], "held_out": [0, 4], "restless": [0, 1, 2, 3, 4]}
    found = measured(tmp_path / "with", 4)
    assert not any(name.endswith(("/n", "/chance", "/tokens")) for name in found)
    words = ["eval", "core8", str(tmp_path / "plain"), "--bundle", str(bundle), "--output", str(tmp_path / "c.json")]
    sized = (tmp_path / "core8.toml").read_text().replace("smoke = 3", "smoke = 4")
    (tmp_path / "four.toml").write_text(sized)
    assert main([*words, "--config", str(tmp_path / "four.toml")]) == 0
    words = ["eval", "text", str(tmp_path / "plain"), "--data-path", str(dataset), "--documents", "3"]
    assert main([*words, "--output", str(tmp_path / "t.json")]) == 0
    asked, read = (json.loads((tmp_path / name).read_text()) for name in ("c.json", "t.json"))
    assert found["eval/core8/core8_centered_mean"] == pytest.approx(asked["core8_centered_mean"])
    for name, entry in asked["tasks"].items():
        assert found[f"eval/core8/{name}/accuracy"] == entry["accuracy"]
        assert found[f"eval/core8/{name}/centered"] == pytest.approx(entry["centered"])
    for name, entry in read["tasks"].items():
        for number in ("nats_per_token", "perplexity", "bits_per_byte"):
            assert found[f"eval/held_out/{name}/{number}"] == pytest.approx(entry[number], rel=1e-6)

    words = ["eval", "canaries", str(tmp_path / "plain"), "--config", str(tmp_path / "canaries.toml")]
    words += ["--tasks", ",".join(canaries["options"]["tasks"]), "--size", "smoke", "--context", "320"]
    assert main([*words, "--output", str(tmp_path / "a.json")]) == 0
    exact = json.loads((tmp_path / "a.json").read_text())
    assert exact["asked"]["form"] == "conversation" and found["eval/canaries/exact_mean"] == exact["exact_mean"]
    for name, entry in exact["tasks"].items():
        for number in {"accuracy", "validity", "ended", "repetition", "mean_tokens"} & entry.keys():
            assert found[f"eval/canaries/{name}/{number}"] == pytest.approx(entry[number]), (name, number)

    stopping = [{**core8, "suite": f"{HERE}:terminated", "interval": 1}]
    stopped = trained(data, tmp_path / "resumed", eval_suites=stopping)
    assert stopped.iteration == 1 and not measured(tmp_path / "resumed", 1)
    assert [path.name for path in (tmp_path / "resumed" / "checkpoints").glob("iter_*")] == ["iter_0000001"]
    resumed = trained(data, tmp_path / "resumed", resume=True, eval_suites=[core8, restless])
    assert resumed.restored_from is not None
    same_weights(tmp_path / "resumed", tmp_path / "plain")
    assert measured(tmp_path / "resumed", 4)["eval/core8/colors/accuracy"] == found["eval/core8/colors/accuracy"]

    with pytest.raises(DataError, match="the suite failing failed with ValueError"):
        trained(data, tmp_path / "failing", eval_suites=[{"suite": f"{HERE}:failing", "interval": 1}])


LABELS = ("core8", "canaries", "held_out", "restless")


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.mark.parametrize(
    ("changes", "kind", "what"),
    [
        ({"suite": "core9"}, ConfigError, "core9 cannot be had: AttributeError"),
        ({"suite": "no_such_module:asks"}, ConfigError, "cannot be had: ModuleNotFoundError"),
        ({"suite": f"{HERE}:HERE"}, ConfigError, "cannot be had"),
        ({"suite": f"{HERE}:CORE8"}, ConfigError, "is no suite"),
        ({"suite": f"{HERE}:no_suite"}, ConfigError, "gave no suite but None"),
        ({"options": {"task": "plain"}}, ConfigError, r"(?s)task.*the options are config, bundle, tasks"),
        ({"options": {"tasks": ["plains"]}}, DataError, "there is no task 'plains'"),
        ({"options": {"bundle": None}}, DataError, r"(?s)bundle is not there.*no_bundle_here.*vpmoe eval core8"),
        ({"options": {"bundle": "elsewhere"}}, DataError, "no CORE bundle"),
        ({"suite": "canaries", "options": {"tasks": ["copy"]}}, ConfigError, r"(?s)no task 'copy'.*choose among"),
        ({"suite": "canaries", "options": {"item": 3}}, ConfigError, r"(?s)item.*the options are config, tasks, plain"),
        ({"suite": "text", "options": {}}, ConfigError, "not one thing"),
        ({"suite": "text", "options": {"texts": "nothing/here"}}, DataError, "nothing/here"),
    ],
)
def test_what_cannot_be_had_is_refused_at_the_start(
    changes: dict[str, Any], kind: type[VpmoeError], what: str, dataset: Path, tmp_path: Path
) -> None:
    part = core8_suite(tmp_path, write_bundle(tmp_path / "bundle", 5))
    options = {**part["options"], **changes.get("options", {})} if changes.get("suite", "core8") == "core8" else {}
    options = {name: value for name, value in (options or changes.get("options", {})).items() if value is not None}
    part |= {**changes, "options": options}
    cfg = tiny_config(data_path=dataset, eval_suites=[part])
    with pytest.raises(kind, match=what) as caught:
        open_suites(cfg, [read_manifest(dataset)])
    assert caught.value.exit_code == 2


@pytest.mark.usefixtures("single_process")
def test_no_weight_is_allocated_before(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_module, "build_model", lambda *_: pytest.fail("a model was built"))
    cfg = tiny_config(data_path=dataset, run_dir=tmp_path, eval_suites=[{"suite": "core9", "interval": 1}])
    with pytest.raises(ConfigError, match="core9"):
        train(cfg)


@pytest.mark.slow
def test_another_vocabulary_is_refused(data: Path, dataset: Path, tmp_path: Path) -> None:
    part = {"suite": "text", "interval": 1, "options": {"data_path": str(dataset)}}
    cfg = tiny_config(data_path=data / "dataset", padded_vocab_size=PADDED_VOCAB, eval_suites=[part])
    with pytest.raises(TokenizerError, match="they differ"):
        open_suites(cfg, [read_manifest(data / "dataset")])
    cfg = tiny_config(data_path=dataset, eval_suites=[core8_suite(tmp_path, write_bundle(tmp_path / "bundle", 5))])
    with pytest.raises(TokenizerError, match="rank file"):  # a vocabulary that no version here has
        open_suites(cfg, [read_manifest(dataset)])


@pytest.mark.parametrize("name", ["Core8", "core8:", "a b:c", "core-8"])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="must be the name of a suite, or module:function"):
        tiny_config(eval_suites=[{"suite": name, "interval": 1}])


def test_two_of_one_name_are_refused(repository: Path) -> None:
    twice = "[{suite: text, interval: 1}, {suite: 'a:text', interval: 2}]"
    with pytest.raises(ConfigError, match="two are called text in metrics"):
        load_config(repository / "configs" / "nano" / "stage1.yaml", ["--eval-suites", twice])
