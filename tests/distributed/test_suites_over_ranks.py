"""Suites of a run over two ranks, with data, experts or matrices shared out, say what one process's say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.mini_dataset import PADDED_VOCAB, SEQ_LENGTH, write_mini
from tests.suites_in_training import canaries_suite, core8_suite
from tests.tiny_core_bundle import write_bundle
from tests.training_runs import command, records, train, train_in_workers, worker
from tests.workers import run_workers

pytestmark = pytest.mark.slow
SPLITS: dict[str, dict[str, object]] = {
    "data": {},
    "experts": {"expert_model_parallel_size": 2},
    "matrices": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset, a bundle, and a run of one process on them."""
    folder = write_mini(tmp_path_factory.mktemp("data"))
    write_bundle(folder / "bundle")
    alone = train(folder / "one", folder / "dataset", **fields(folder))
    assert alone.returncode == 0, alone.stdout + alone.stderr
    return folder


def fields(folder: Path, **core8: object) -> dict[str, Any]:
    """Uneven shares: five passages, in batches of two, and items of any number."""
    text = {"suite": "text", "interval": 9, "items": 5, "options": {"data_path": str(folder / "dataset")}}
    text["options"] = {**text["options"], "batch_size": 2}
    suites = [core8_suite(folder, folder / "bundle", **core8), canaries_suite(folder), text]
    how = {"padded_vocab_size": PADDED_VOCAB, "seq_length": SEQ_LENGTH, "train_iters": 1, "lr_warmup_iters": 0}
    return {**how, "eval_at_start": True, "eval_interval": None, "eval_suites": suites}


def told(run: Path) -> dict[str, float]:
    """At step 0, before ranks' rounding parts the weights."""
    return {
        record["tag"]: record["value"]
        for record in records(run)
        if record["tag"].startswith("eval/") and record["step"] == 0 and not record["tag"].endswith("/seconds")
    }


@pytest.mark.parametrize("split", SPLITS)
def test_two_ranks_find_what_one_does(split: str, folder: Path) -> None:
    train_in_workers(2, folder / split, folder / "dataset", **fields(folder), **SPLITS[split])
    expected = told(folder / "one")
    assert len(expected) > 25 and told(folder / split) == pytest.approx(expected, abs=1e-5, rel=1e-6)


def test_one_rank_that_is_asked_to_stop_within_a_suite_stops_both(folder: Path) -> None:
    how = fields(folder, suite="tests.suites_in_training:terminated", interval=1)
    how |= {"eval_at_start": False, "train_iters": 2, "nproc_per_node": 2, **SPLITS["experts"]}
    arguments = command(folder / "stopped", folder / "dataset", **how)[3:]
    assert run_workers(2, worker, arguments, folder=folder) == [0, 0]
    assert [path.name for path in (folder / "stopped" / "checkpoints").glob("iter_*")] == ["iter_0000001"]
    assert not any(record["tag"].startswith("eval/") for record in records(folder / "stopped"))
