"""A bf16 run of the nano model stays within a stated band of the fp32 run, through the product's entry point."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from megatron_vpmoe.data.batch import Document
from tests.fixtures_dataset import EOD, PADDED_VOCAB, write_dataset
from tests.tiny import ROOT
from tests.training_runs import losses, worker
from tests.workers import Started

STEPS, SEQ = 200, 96
# The band, in the loss over both spans (nats). Routing makes training chaotic: an fp32 run whose micro-batches are
# split otherwise, equal to 3e-7 over the first steps, goes its own way later. So such a run is the yardstick.
FIRST_STEPS, FIRST_BAND = 10, 0.02  # every single one of the first steps: relative; measured 0.009
WINDOW, TIMES, BAND = 20, 2.0, 0.05  # means over 20 steps: twice the yardstick's distance + 0.05; measured 1.3 times


def progression(seed: int) -> Document:
    """A conversation that can be learnt: start, difference, then start + n · difference modulo 43."""
    random = np.random.default_rng(seed)
    start, difference, length = random.integers(0, 43), random.integers(1, 8), random.integers(12, 30)
    terms = 3 + (start + difference * np.arange(length)) % 43
    tokens = np.concatenate([[3 + start, 3 + difference], terms, [EOD]]).astype(np.int32)
    span = np.where(np.arange(len(tokens)) < length // 2, 1, 2).astype(np.uint8)
    span[0] = span[-1] = 0
    return Document(tokens, (span > 0).astype(np.uint8), span)


def start(run_dir: Path, dataset: Path, *, bf16: bool, rows: int) -> Started:
    flags = {
        "run_dir": run_dir,
        "data_path": dataset,
        "bf16": str(bf16).lower(),
        "padded_vocab_size": PADDED_VOCAB,
        "seq_length": SEQ,
        "train_iters": STEPS,
        "micro_batch_size": rows,
        "global_batch_size": 2,
        "nproc_per_node": 1,
        "log_interval": 1,
        "eval_interval": STEPS,
        "save_interval": "null",
        "sample_interval": "null",
        "wandb_mode": "disabled",
    }
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    return Started(worker, [str(ROOT / "configs" / "nano" / "stage1.yaml"), *words], environment={})


@pytest.mark.slow
def test_two_hundred_steps(tmp_path: Path) -> None:
    documents = [progression(seed) for seed in range(2000)]
    dataset = write_dataset(
        tmp_path / "data", {"train": [documents[:1900]], "valid": [documents[1900:]]}, seq_length=SEQ
    )
    kinds = {"fp32": (False, 2), "bf16": (True, 2), "yardstick": (False, 1)}
    runs = {name: start(tmp_path / name, dataset, bf16=kind[0], rows=kind[1]) for name, kind in kinds.items()}
    for name, run in runs.items():
        assert run.finish(timeout=900).returncode == 0, name
    curves = {name: np.array([value for _, value in sorted(losses(tmp_path / name).items())]) for name in runs}
    assert {len(curve) for curve in curves.values()} == {STEPS}
    first = np.abs(curves["bf16"] / curves["fp32"] - 1)[:FIRST_STEPS]
    assert first.max() < FIRST_BAND
    assert first.max() > 1e-6, "the bf16 run computed in fp32"
    smooth = {name: np.convolve(curve, np.full(WINDOW, 1 / WINDOW), "valid") for name, curve in curves.items()}
    distance = {name: np.abs(smooth[name] - smooth["fp32"]) for name in ("bf16", "yardstick")}
    bound = TIMES * distance["yardstick"].max() + BAND
    worst = distance["bf16"].argmax()
    assert distance["bf16"].max() < bound, f"steps {worst + 1} to {worst + WINDOW}"
    # A slow drift that the steep beginning would hide: the end has a band of its own.
    assert distance["bf16"][-1] < TIMES * distance["yardstick"][-WINDOW:].max() + BAND
    assert smooth["fp32"][-1] < 0.15 * curves["fp32"][0], "nothing was learnt: the band says nothing"
