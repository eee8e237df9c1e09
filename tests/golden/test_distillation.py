"""Teachers through the real loop: a dense one and a sparse student, live, served and stored, and what is refused."""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vpmoe.errors import CheckpointError, ConfigError
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training import run as run_module
from megatron_vpmoe.training.initial_weights import geometry_of
from megatron_vpmoe.training.loop import train
from tests.fixtures_dataset import rewrite_manifest
from tests.stand_in_server import ModelStandIn, serving
from tests.tiny import tiny_config
from tests.training_runs import checkpoint_tensors, records, train_in_workers
from vpmoe.cli import main
from vpmoe.eval.open_model import open_model
from vpmoe.teacher import in_training
from vpmoe.teacher.server import ServerError, Settings
from vpmoe.tokenizer import CompactVocabulary, load_tokenizer

pytestmark = pytest.mark.slow

METRICS = [
    *(f"{what}/{span}" for what in ("loss", "kd") for span in ("analysis", "final")),
    *(f"teacher/{what}" for what in ("captured_mass", "entropy", "agreement", "first_choice_p")),
]
VOCAB, SEQ = 400, 192  # no row of an id that means nothing: a server has none
SIZES = {"seq_length": SEQ, "padded_vocab_size": VOCAB, "num_layers": 2, "train_iters": 3}
DENSE = {"num_experts": None, "num_layers": 2, "hidden_size": 48, "value_residual": False}


def trained(run: Path, data: Path, **fields: object) -> Any:
    fields = {"log_interval": 1, "eval_interval": None, **SIZES, **fields}
    with distributed.single_process(seed=1234):
        return train(tiny_config(data_path=data, run_dir=run, **fields))  # type: ignore[arg-type]


def values(run: Path, tag: str) -> list[float]:
    return [record["value"] for record in records(run) if record["tag"] == tag]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations of synth_mini in a compact vocabulary."""
    folder = tmp_path_factory.mktemp("kd")
    rows, conversations, built = (str(folder / name) for name in ("rows", "conversations", "dataset"))
    assert main(["data", "synth-mini", "--output-dir", rows, "--rows", "80"]) == 0
    assert main(["data", "convert", "--input", rows, "--output-dir", conversations, "--num-shards", "2"]) == 0
    vocabulary = ["--compact-vocab-size", str(VOCAB), "--padded-vocab-size", str(VOCAB), "--valid-fraction", "0.2"]
    build = ["--input-dir", conversations, "--output-dir", built, "--seq-len", str(SEQ), "--workers", "1", "--quiet"]
    assert main(["data", "build", *build, *vocabulary]) == 0
    return folder / "dataset"


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    trained(run, dataset, **DENSE)
    return run


def test_a_live_teacher_of_another_shape_is_the_stored_one(dataset: Path, teacher: Path, tmp_path: Path) -> None:
    fields = {"objective": "topk_kd", "kd_top_k": 6, "kd_temperature": 2.0, "kd_alpha": 0.7, "eval_interval": 3}
    live = {**fields, "teacher_weights": teacher}
    trained(tmp_path / "live", dataset, **live)
    # Experts over two ranks, the dense teacher whole on each.
    ranks = {**SIZES, **live, "micro_batch_size": 1, "expert_model_parallel_size": 2}
    train_in_workers(2, tmp_path / "ranks", dataset, **ranks)
    for name, options in (("stored", ["--coding", "exact"]), ("part", ["--fraction", "0.5"])):
        scored = ["--teacher", str(teacher), "--output-dir", str(tmp_path / f"{name}_ahead"), "--quiet", *options]
        assert main(["data", "score", str(dataset), "--top-k", "8", "--temperature", "2.0", *scored]) == 0
        trained(tmp_path / name, tmp_path / f"{name}_ahead", **fields)

    for tag in (*METRICS, *(f"valid/{tag}" for tag in METRICS), "loss/total", "grad_norm"):
        expected = values(tmp_path / "live", tag)
        assert expected, tag
        for other in ("stored", "ranks"):
            assert values(tmp_path / other, tag) == pytest.approx(expected, rel=1e-4, abs=1e-5), (other, tag)
    assert set(values(tmp_path / "live", "tokens/without_record")) == {0}
    part = {
        tag: sum(values(tmp_path / "part", tag))
        for tag in ("tokens/without_record", "recorded/final", "recorded/analysis")
    }
    tokens = sum(sum(values(tmp_path / "part", f"tokens/{span}")) for span in ("analysis", "final"))
    assert all(part.values()) and sum(part.values()) == tokens


TAUGHT = {
    "objective": "on_policy",
    "rollout_groups": 12,
    "rollout_group_size": 1,
    "rollout_max_new_tokens": 12,
    "global_batch_size": 4,
    "adam_eps": 1e-3,  # a large one: Adam turns the sign of a rounding error into a full update otherwise
}
SERVED: dict[str, dict[str, object]] = {
    "topk_kd": {"objective": "topk_kd", "kd_top_k": 6, "eval_interval": 3, "eval_iters": 1},
    "sampled": {**TAUGHT, "opd_anchor_share": 0.3},
    "topk": {**TAUGHT, "opd_loss": "topk", "kd_top_k": 6},
}


@pytest.fixture
def served(dataset: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelStandIn]:
    """The teacher behind a server; who asks it does not wait long between attempts."""
    monkeypatch.setattr(in_training, "Settings", partial(Settings, first_wait=0.01, attempts=3))
    with open_model(teacher) as opened:
        model = opened.model
    vocabulary = load_tokenizer(dataset)
    assert isinstance(vocabulary, CompactVocabulary)
    with serving(ModelStandIn(model, vocabulary)) as stand_in:
        yield stand_in


@pytest.mark.parametrize("name", SERVED)
def test_a_served_teacher_is_the_live_one(
    name: str, dataset: Path, teacher: Path, served: ModelStandIn, tmp_path: Path
) -> None:
    """Of one loss over two ranks, each of which asks about its own rows."""
    fields = SERVED[name]
    by_server = {**fields, "teacher_server": served.address, "served_model": "stand-in", "teacher_concurrency": 3}
    trained(tmp_path / "live", dataset, teacher_weights=teacher, **fields)
    if name == "topk":
        ranks = {"log_interval": 1, "eval_interval": None, **SIZES, **by_server, "micro_batch_size": 1}
        with distributed.single_process(seed=1):  # what the served model computes with
            train_in_workers(2, tmp_path / "served", dataset, **ranks)
    else:
        trained(tmp_path / "served", dataset, **by_server)
    live, there = ({(r["step"], r["tag"]): r["value"] for r in records(tmp_path / run)} for run in ("live", "served"))
    prefixes = ("loss/", "kd/", "gap/", "teacher/", "policy/", "tokens/", "valid/", "anchor/", "grad_norm")
    told = [key for key in live if key[1].startswith(prefixes) and "seconds" not in key[1]]
    assert len(told) > 20 and live.keys() == there.keys()
    for key in told:
        assert there[key] == pytest.approx(live[key], rel=2e-4, abs=2e-5), key
    assert all(value > 0 for (_, tag), value in there.items() if tag == "teacher/seconds_scoring")


def test_a_teacher_that_goes_away_costs_nothing(
    dataset: Path, served: ModelStandIn, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped while it waits for an answer, then the server dies within a step; each time what was trained is saved."""
    fields = {**SERVED["sampled"], "served_model": "stand-in", "save_interval": 100, "teacher_concurrency": 1}
    trained(tmp_path / "whole", dataset, teacher_server=served.address, **fields)
    of_step = [r["value"] for r in records(tmp_path / "whole") if r["tag"] == "teacher/seconds_scoring"]
    assert len(of_step) == 3

    def goes_on() -> Any:
        served.asked = 0
        return trained(tmp_path / "run", dataset, teacher_server=served.address, resume=True, **fields)

    # The probe is request 0, then there is one for each of a step's four answers.
    served.asked_to[6] = lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(60))
    began = time.monotonic()
    assert goes_on().iteration == 1 and time.monotonic() - began < 50
    assert "asked to stop: what came after step 1" in capsys.readouterr().out
    served.asked_to.clear()
    served.dead_from = 6
    with pytest.raises(ServerError, match=r"no usable answer in 3 attempts: .*500") as caught:
        goes_on()
    assert "--resume" in str(caught.value) and "after step 2 is left out" in capsys.readouterr().out
    served.dead_from = 0
    with pytest.raises(ServerError, match="no usable answer in 2 attempts"):
        goes_on()
    served.dead_from = None
    # Another address is the same teacher; another model is not.
    fields["served_model"] = "another"
    with pytest.raises(CheckpointError, match="served_model: 'stand-in' -> 'another'"):
        goes_on()
    fields["served_model"] = "stand-in"
    served.address += "/v1"
    assert goes_on().iteration == 3
    mine, theirs = (checkpoint_tensors(tmp_path / run / "checkpoints" / "iter_0000003") for run in ("run", "whole"))
    assert mine.keys() == theirs.keys() and all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_what_no_teacher_can_say_is_refused_before_any_weight(
    dataset: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "build_model", lambda *_: pytest.fail("a model was built"))
    kd = {"objective": "topk_kd", "kd_top_k": 6}
    with pytest.raises(ConfigError, match=r"topk_kd needs the annotation 'teacher_ids'.*teacher_log_p") as caught:
        trained(tmp_path / "none", dataset, **kd)
    assert "training.teacher_weights" in str(caught.value)
    stored = tmp_path / "set"
    scored = ["--teacher", str(teacher), "--output-dir", str(stored), "--top-k", "5", "--quiet"]
    assert main(["data", "score", str(dataset), *scored]) == 0
    with pytest.raises(ConfigError, match=r"'teacher_ids' as .*width=6.*; it is .*width=5"):
        trained(tmp_path / "wide", stored, **kd)
    with pytest.raises(ConfigError, match=r"'teacher_log_p' as .*temperature=2.0; it is .*temperature=1.0"):
        trained(tmp_path / "hot", stored, **{**kd, "kd_top_k": 5, "kd_temperature": 2.0})
    with pytest.raises(ConfigError, match=r"the data bring teacher_ids, .* already"):
        trained(tmp_path / "twice", stored, **{**kd, "kd_top_k": 5, "teacher_weights": teacher})
    other = tmp_path / "other"
    shutil.copytree(dataset, other)
    rewrite_manifest(other, lambda m: m["tokenizer"].update(rank_file_sha256="1" * 64))
    with pytest.raises(CheckpointError, match="do not share a vocabulary") as caught:
        trained(tmp_path / "vocabulary", other, teacher_weights=teacher, **kd)
    assert "training.teacher_weights" in str(caught.value)
    for fields, named in (
        ({"padded_vocab_size": 128}, "padded_vocab_size: 400 -> 128"),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True, "num_query_groups": 4},
            "num_query_groups|2 cannot",
        ),
    ):
        with pytest.raises(CheckpointError, match=named):
            geometry_of(tiny_config(nproc_per_node=4, **{**SIZES, **fields}), str(teacher), "training.teacher_weights")  # type: ignore[arg-type]
