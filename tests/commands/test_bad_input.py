"""What a user does wrong, typed as a user types it: one message with value, source and remedy, and exit code 2."""

from __future__ import annotations

import gzip
import os
import subprocess
import sys
import time
from importlib.resources import files
from pathlib import Path

import pytest

from tests import training_runs
from tests.fixtures_dataset import describe_files, rewrite_manifest, small_dataset, write_part
from tests.tiny import ROOT, TINY, flag_text

SECONDS = 30  # "within seconds", on a loaded machine
NANO = "configs/nano/stage1.yaml"


def run(*command: object) -> subprocess.CompletedProcess[str]:
    started = time.monotonic()
    done = subprocess.run(
        [str(word) for word in command],
        cwd=ROOT,
        env={**training_runs.ENVIRONMENT},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert time.monotonic() - started < SECONDS
    return done


def train(**fields: object) -> subprocess.CompletedProcess[str]:
    flags = [word for name, value in fields.items() for word in (f"--{name.replace('_', '-')}", flag_text(value))]
    return run("scripts/train.sh", NANO, *flags)


def assert_refused(done: subprocess.CompletedProcess[str], *fragments: str) -> None:
    said = done.stdout + done.stderr
    assert done.returncode == 2, said
    assert "Traceback" not in said
    assert "remedy" in said
    for fragment in fragments:
        assert fragment in said, said


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    return small_dataset(tmp_path / "set")


def tiny_run(dataset: Path, tmp_path: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    return train(**{**TINY, "data_path": dataset, "run_dir": tmp_path / "run", **changes})


def test_a_wrong_key_and_a_wrong_type_at_once() -> None:
    done = run("scripts/train.sh", NANO, "--num-layer", "4", "--hidden-size", "wide")
    assert_refused(done, "--num-layer", "--num-layers", "wide", "hidden_size")


def test_a_missing_dataset(tmp_path: Path) -> None:
    assert_refused(tiny_run(tmp_path / "nothing", tmp_path), str(tmp_path / "nothing"), "build_synth_kd_v1.py")


def test_sidecars_that_disagree(dataset: Path, tmp_path: Path) -> None:
    from megatron_vpmoe.data.kd_dataset import KDDataset

    whole = KDDataset.open(dataset, "train", seq_length=48, padded_vocab_size=64)
    spans = [whole[index].span_id.copy() for index in range(20)]
    spans[3] = spans[3][:-1]
    del whole  # its files are memory-mapped, and about to be replaced
    write_part(dataset / "train", "shard_00", "span", spans)

    def describe_again(manifest: dict) -> None:
        manifest["splits"]["train"]["shards"][0]["files"] = describe_files(dataset / "train", "shard_00")

    rewrite_manifest(dataset, describe_again)
    assert_refused(tiny_run(dataset, tmp_path), "shard_00", "document 3", "span")


def test_a_vocabulary_of_another_size(dataset: Path, tmp_path: Path) -> None:
    assert_refused(tiny_run(dataset, tmp_path, padded_vocab_size=128), "128", "64", "--padded-vocab-size 64")


def test_a_checkpoint_of_another_geometry(dataset: Path, tmp_path: Path) -> None:
    trained = training_runs.train(tmp_path / "run", dataset, train_iters=3, lr_warmup_iters=1)
    assert trained.returncode == 0, trained.stderr
    done = tiny_run(dataset, tmp_path, hidden_size=64, resume=True)
    assert_refused(done, "model.hidden_size: 32 -> 64", str(tmp_path / "run"))
    assert_refused(tiny_run(dataset, tmp_path), "--resume")


def test_a_run_that_the_machine_cannot_hold() -> None:
    """The full-scale configuration stops before it allocates, with the estimate and the nano configuration to try."""
    if os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") > 150 * 2**30:
        pytest.skip("this machine has memory for the full-scale run")
    done = run("scripts/train.sh", "configs/vpmoe_stage1.yaml")
    assert_refused(done, "parameters", "optimizer", "activations", "configs/nano/stage1.yaml")


def test_a_tokenizer_file_with_a_wrong_hash(tmp_path: Path) -> None:
    packed = files("bpe_openai").joinpath("data/o200k_base.tiktoken.gz")
    damaged = tmp_path / "o200k_base.tiktoken"
    damaged.write_bytes(gzip.decompress(packed.read_bytes())[:-1])
    build = [sys.executable, "scripts/datasets/build_synth_kd_v1.py", "--tokenizer-model", damaged]
    done = run(*build, "--input-dir", tmp_path, "--output-dir", tmp_path / "out")
    said = done.stdout + done.stderr
    assert done.returncode == 2 and "Traceback" not in said, said
