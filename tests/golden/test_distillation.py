"""topk_kd through the real loop: a dense teacher and a sparse student, live and stored ahead, and what is refused."""

from __future__ import annotations

from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.errors import CheckpointError, ConfigError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.sources import Teacher
from megatron_vpmoe.sources.annotated import of_documents
from megatron_vpmoe.training import run as run_module
from megatron_vpmoe.training.initial_weights import geometry_of, load_weights
from megatron_vpmoe.training.loop import train
from tests.fixtures_dataset import VOCAB, rewrite_manifest, small_dataset, stored_ahead, with_records
from tests.tiny import tiny_config
from tests.training_runs import records, train_in_workers

pytestmark = pytest.mark.slow

METRICS = [
    *(f"{what}/{span}" for what in ("loss", "kd") for span in ("analysis", "final")),
    *(f"teacher/{what}" for what in ("captured_mass", "entropy", "agreement", "first_choice_p")),
]
DENSE = {"num_experts": None, "num_layers": 2, "hidden_size": 48, "value_residual": False}


def trained(run: Path, data: Path, **fields: object) -> Any:
    fields = {"log_interval": 1, "eval_interval": None, "num_layers": 2, "train_iters": 3, **fields}
    with distributed.single_process(seed=1234):
        return train(tiny_config(data_path=data, run_dir=run, **fields))  # type: ignore[arg-type]


def values(run: Path, tag: str) -> list[float]:
    return [record["value"] for record in records(run) if record["tag"] == tag]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> Path:
    run = tmp_path_factory.mktemp("teacher") / "run"
    trained(run, dataset, **DENSE)
    return run


@pytest.mark.parametrize("top_k", [6, VOCAB])
def test_a_live_teacher_of_another_shape_is_the_stored_one(
    top_k: int, dataset: Path, teacher: Path, tmp_path: Path
) -> None:
    fields = {"objective": "topk_kd", "kd_top_k": top_k, "kd_temperature": 2.0, "kd_alpha": 0.7, "eval_interval": 3}
    live = {**fields, "teacher_weights": teacher}
    trained(tmp_path / "live", dataset, **live)
    if top_k == 6:  # experts over two ranks, the dense teacher whole on each
        both = {**live, "micro_batch_size": 1, "expert_model_parallel_size": 2, "num_layers": 2, "train_iters": 3}
        train_in_workers(2, tmp_path / "ranks", dataset, **both)

    stored = small_dataset(tmp_path / "stored_ahead")
    with distributed.single_process(seed=1234):
        found, cfg = geometry_of(tiny_config(num_layers=2), str(teacher), "teacher")
        assert (cfg.model.hidden_size, cfg.moe.num_experts) == (48, None)
        annotator, model = Teacher(top_k, 2.0, VOCAB), build_model(cfg)
        load_weights(model, found, "teacher")
        annotator.open(model)
        how = {"eod_id": read_manifest(stored).tokenizer.eod_id, "seq_length": 48, "rows": 2}
        stored_ahead(stored, annotator.annotations, lambda d: chain.from_iterable(of_documents(d, annotator, **how)))
    trained(tmp_path / "stored", stored, **fields)

    for tag in (*METRICS, *(f"valid/{tag}" for tag in METRICS), "loss/total", "grad_norm"):
        expected = values(tmp_path / "live", tag)
        assert expected, tag
        for other in ("stored", "ranks") if top_k == 6 else ("stored",):
            assert values(tmp_path / other, tag) == pytest.approx(expected, rel=1e-4, abs=1e-5), (other, tag)
    assert set(values(tmp_path / "live", "tokens/without_record")) == {0}
    assert values(tmp_path / "live", "teacher/captured_mass")[0] == pytest.approx(1, abs=1 if top_k == 6 else 0.3)


def test_what_no_teacher_can_say_is_refused_before_any_weight(
    dataset: Path, teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "build_model", lambda *_: pytest.fail("a model was built"))
    kd = {"objective": "topk_kd", "kd_top_k": 6}
    with pytest.raises(ConfigError, match=r"topk_kd needs the annotation 'teacher_ids'.*teacher_log_p") as caught:
        trained(tmp_path / "none", dataset, **kd)
    assert "training.teacher_weights" in str(caught.value)
    stored = with_records(small_dataset(tmp_path / "set"), 5)
    with pytest.raises(ConfigError, match=r"'teacher_ids' as .*width=6.*; it is .*width=5"):
        trained(tmp_path / "wide", stored, **kd)
    with pytest.raises(ConfigError, match=r"'teacher_log_p' as .*temperature=2.0; it is .*temperature=1.0"):
        trained(tmp_path / "hot", stored, **{**kd, "kd_top_k": 5, "kd_temperature": 2.0})
    with pytest.raises(ConfigError, match=r"the data bring teacher_ids, .* already"):
        trained(tmp_path / "twice", stored, **{**kd, "kd_top_k": 5, "teacher_weights": teacher})
    other = small_dataset(tmp_path / "other")
    rewrite_manifest(other, lambda m: m["tokenizer"].update(rank_file_sha256="1" * 64))
    with pytest.raises(CheckpointError, match="do not share a vocabulary") as caught:
        trained(tmp_path / "vocabulary", other, teacher_weights=teacher, **kd)
    assert "training.teacher_weights" in str(caught.value)
    with pytest.raises(ConfigError, match=f"60 ids a token of the {VOCAB}"):
        trained(tmp_path / "all", dataset, **{**kd, "kd_top_k": 60, "teacher_weights": teacher})
    for fields, named in (
        ({"padded_vocab_size": 128}, "padded_vocab_size: 64 -> 128"),
        (
            {"tensor_model_parallel_size": 4, "sequence_parallel": True, "num_query_groups": 4},
            "num_query_groups|2 cannot",
        ),
    ):
        with pytest.raises(CheckpointError, match=named):
            geometry_of(tiny_config(nproc_per_node=4, **fields), str(teacher), "training.teacher_weights")  # type: ignore[arg-type]
