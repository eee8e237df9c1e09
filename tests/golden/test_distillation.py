"""topk_kd through the real loop: a dense teacher and a sparse student, live and stored ahead, and what is refused."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.errors import CheckpointError, ConfigError
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training import run as run_module
from megatron_vpmoe.training.initial_weights import geometry_of
from megatron_vpmoe.training.loop import train
from tests.fixtures_dataset import rewrite_manifest
from tests.tiny import tiny_config
from tests.training_runs import records, train_in_workers
from vpmoe.cli import main

pytestmark = pytest.mark.slow

METRICS = [
    *(f"{what}/{span}" for what in ("loss", "kd") for span in ("analysis", "final")),
    *(f"teacher/{what}" for what in ("captured_mass", "entropy", "agreement", "first_choice_p")),
]
VOCAB, PADDED, SEQ = 400, 448, 192
SIZES = {"seq_length": SEQ, "padded_vocab_size": PADDED, "num_layers": 2, "train_iters": 3}
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
    vocabulary = ["--compact-vocab-size", str(VOCAB), "--padded-vocab-size", str(PADDED), "--valid-fraction", "0.2"]
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
    with pytest.raises(ConfigError, match="440 ids a token of the"):
        trained(tmp_path / "all", dataset, **{**kd, "kd_top_k": 440, "teacher_weights": teacher})
    for fields, named in (
        ({"padded_vocab_size": 128}, "padded_vocab_size: 448 -> 128"),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True, "num_query_groups": 4},
            "num_query_groups|2 cannot",
        ),
    ):
        with pytest.raises(CheckpointError, match=named):
            geometry_of(tiny_config(nproc_per_node=4, **{**SIZES, **fields}), str(teacher), "training.teacher_weights")  # type: ignore[arg-type]
