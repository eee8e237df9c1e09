"""A run on its own answers over several ranks, with their data or their experts shared out, is the run of one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fixtures_dataset import small_dataset
from tests.golden.test_resume_grpo import SAMPLED, told
from tests.training_runs import train, train_in_workers

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("experts", "replay"), [(1, "off"), (2, "replay")])
def test_two_ranks_sample_and_learn_what_one_does(tmp_path: Path, experts: int, replay: str) -> None:
    dataset = small_dataset(tmp_path / "kd", train=12, valid=4)
    fields = {**SAMPLED, "train_iters": 5, "global_batch_size": 8, "router_replay": replay}
    alone = train(tmp_path / "one", dataset, **fields)
    assert alone.returncode == 0, alone.stdout + alone.stderr
    train_in_workers(2, tmp_path / "two", dataset, expert_model_parallel_size=experts, **fields)
    one, two = told(tmp_path / "one"), told(tmp_path / "two")
    assert [entry[:2] for entry in one] == [entry[:2] for entry in two]
    for (step, tag, value), (_, _, other) in zip(one, two, strict=True):
        assert other == pytest.approx(value, rel=1e-3, abs=1e-5), (step, tag)
