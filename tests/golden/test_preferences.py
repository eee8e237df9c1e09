"""DPO through the real loop, on pairs that the command builds from synth_mini: right against wrong answers."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron_vpmoe.errors import CheckpointError, ConfigError, DataError
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training import loop
from megatron_vpmoe.training import run as run_module
from tests.tiny import tiny_config
from tests.training_runs import checkpoint_tensors, records, train, train_in_workers, train_signalled
from vpmoe.cli import main
from vpmoe.data_curation.tasks.synth_mini import make_row

PAIRS, PADDED, SEQ = 400, 320, 192
METRICS = (
    "loss/total",
    "rewards/chosen",
    "rewards/rejected",
    "rewards/margin",
    "accuracy/relative",
    "accuracy/policy",
    "log_p/chosen",
    "log_p/rejected",
    "kl/reference",
)


def right_and_wrong(count: int) -> list[dict[str, str]]:
    """Digits to sort, in order and in the opposite order; questions with one digit alone have no wrong answer."""
    rows = [make_row(0, index, {"sorting": 1.0}) for index in range(count)]
    return [
        {"prompt": row["query"], "chosen": row["synthetic_answer"], "rejected": row["synthetic_answer"][::-1]}
        for row in rows
        if row["synthetic_answer"] != row["synthetic_answer"][::-1]
    ]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """pairs/, and sft/ of the chosen answers, in one vocabulary."""
    folder = tmp_path_factory.mktemp("data")
    rows = right_and_wrong(PAIRS)
    chosen = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows]
    texts = [{"text": row["prompt"]} for row in rows]
    for name, written in (("pairs", rows), ("chat", chosen), ("texts", texts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    size = ["--size", "300", "--output-dir", str(folder / "map")]
    assert main(["data", "compact-map", "--input", str(folder / "texts.jsonl"), *size]) == 0
    options = ["--compact-map", str(folder / "map" / "compact_vocab.npy"), "--padded-vocab-size", str(PADDED)]
    options += ["--seq-len", str(SEQ), "--valid-fraction", "0.2", "--quiet"]
    for verb in ("pairs", "chat"):
        paths = ["--input", str(folder / f"{verb}.jsonl"), "--output-dir", str(folder / verb)]
        assert main(["data", f"build-{verb}", *paths, *options]) == 0
    return folder


def settings(dataset: Path, **changes: Any) -> dict[str, Any]:
    return {
        "objective": "dpo",
        "data_path": dataset,
        "seq_length": SEQ,
        "padded_vocab_size": PADDED,
        "num_layers": 2,
        "window_attn_skip_freq": 2,
        "lr_warmup_iters": 0,
        "micro_batch_size": 4,
        "global_batch_size": 8,
        "log_interval": 1,
        "eval_interval": None,
        "sample_interval": None,
        "save_interval": None,
        **changes,
    }


def trained(run: Path, fields: dict[str, Any]) -> Any:
    with distributed.single_process(seed=1234):
        return loop.train(tiny_config(run_dir=run, **fields))


@pytest.fixture(scope="module")
def start(datasets: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that has begun to imitate."""
    run = tmp_path_factory.mktemp("start") / "run"
    trained(run, settings(datasets / "chat", objective="span_ce", train_iters=2))
    return run


def values(run: Path, tag: str) -> dict[int, float]:
    return {record["step"]: record["value"] for record in records(run) if record["tag"] == tag}


def test_it_learns_what_is_preferred(datasets: Path, start: Path, tmp_path: Path) -> None:
    run, held = tmp_path / "run", {"load_weights": start, "reference_weights": start}
    evaluated = {"eval_at_start": True, "eval_interval": 60, "train_iters": 60}
    trained(run, settings(datasets / "pairs", dpo_beta=0.05, **held, **evaluated))
    of_valid = {tag: values(run, f"valid/{tag}") for tag in METRICS}
    assert values(run, "loss/total")[1] == pytest.approx(np.log(2), rel=1e-5)  # the reference is the model itself
    assert of_valid["loss/total"][60] < 0.5 * of_valid["loss/total"][0]
    assert of_valid["accuracy/relative"][60] >= 0.9 > of_valid["accuracy/relative"][0]
    assert of_valid["accuracy/policy"][60] >= 0.95 > of_valid["accuracy/policy"][0]
    assert of_valid["rewards/margin"][60] > 1 and of_valid["kl/reference"][60] > of_valid["kl/reference"][0]


@pytest.mark.slow
def test_stored_or_live_in_any_split_it_is_the_same_run(datasets: Path, start: Path, tmp_path: Path) -> None:
    fields = settings(datasets / "pairs", load_weights=start, train_iters=4, eval_interval=4, optimizer="adam")
    live = {**fields, "reference_weights": start, "save_interval": 2}
    assert train(tmp_path / "live", datasets / "pairs", **live).returncode == 0
    trained(tmp_path / "accumulated", {**live, "micro_batch_size": 1})
    train_in_workers(2, tmp_path / "ranks", datasets / "pairs", **{**live, "micro_batch_size": 2})

    stored = tmp_path / "stored_ahead"
    of_start = ["--reference", str(start), "--output-dir", str(stored), "--quiet"]
    assert main(["data", "annotate", str(datasets / "pairs"), *of_start]) == 0
    trained(tmp_path / "stored", {**fields, "data_path": stored})
    with pytest.raises(CheckpointError, match=r"another model.*\n.*grapem_log_freq_scale: 16.0 -> 8.0") as caught:
        trained(tmp_path / "other", {**fields, "data_path": stored, "load_weights": None, "grapem_log_freq_scale": 8.0})
    assert "reference_log_p by" in str(caught.value)

    # Killed in the second micro-batch of step 3, and resumed: the same bits.
    signalled = ("megatron_vpmoe.objectives.dpo:DPO.__call__", 6, signal.SIGKILL, tmp_path / "killed")
    assert train_signalled(*signalled, datasets / "pairs", **live).returncode == -signal.SIGKILL
    assert train(tmp_path / "killed", datasets / "pairs", **live, resume=True).returncode == 0
    ours, straight = (
        checkpoint_tensors(tmp_path / name / "checkpoints" / "iter_0000004") for name in ("killed", "live")
    )
    assert ours.keys() == straight.keys() and all(torch.equal(ours[key], straight[key]) for key in straight)
    assert values(tmp_path / "killed", "loss/total") == values(tmp_path / "live", "loss/total")

    for tag in (*METRICS, "grad_norm", "pairs", "valid/loss/total", "valid/rewards/margin"):
        expected = values(tmp_path / "live", tag)
        assert len(expected) == (1 if tag.startswith("valid") else 4)
        if tag.startswith("accuracy"):
            del expected[1]  # model and reference are the same there, but for rounding
        for other in ("accumulated", "ranks", "stored"):
            found = values(tmp_path / other, tag)
            assert {step: found[step] for step in expected} == pytest.approx(expected, rel=1e-3, abs=1e-4), (other, tag)


def test_what_cannot_be_trained_on_is_refused(
    datasets: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_module, "build_model", lambda *_: pytest.fail("a model was built"))
    with pytest.raises(ConfigError, match=r"dpo needs the annotation 'reference_log_p'") as caught:
        trained(tmp_path / "none", settings(datasets / "pairs"))
    assert "training.reference_weights" in str(caught.value)
    with pytest.raises(DataError, match="dpo reads harmony_preference, and the dataset is of kind harmony_sft"):
        trained(tmp_path / "chat", settings(datasets / "chat", reference_weights=start))
    with pytest.raises(DataError, match="span_ce does not read harmony_preference"):
        trained(tmp_path / "imitated", settings(datasets / "pairs", objective="span_ce"))
