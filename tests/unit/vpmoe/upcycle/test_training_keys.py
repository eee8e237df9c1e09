"""The key of a training of a ladder: what decides its weights, wherever that lies."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.fixtures_dataset import small_dataset
from tests.tiny import tiny_config
from tests.tiny_student import write_student
from vpmoe.upcycle import training_jobs
from vpmoe.upcycle.ladder_file import ObjectSpec
from vpmoe.upcycle.training_jobs import Pretrain, TrainingSettings


@pytest.mark.slow
def test_a_teacher_is_its_weights_and_not_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dataset = small_dataset(tmp_path / "kd", train=4, valid=2)

    def key(teacher: Path) -> dict:
        cfg = tiny_config(objective="topk_kd", teacher_weights=str(teacher), data_path=str(dataset))
        monkeypatch.setattr(training_jobs, "training_config", lambda spec, settings: cfg)
        return Pretrain().decides(
            ObjectSpec(id="one", rung=1, path="one", job="pretrain"), TrainingSettings(config="of.yaml")
        )

    one = write_student(tmp_path / "one", seed=1)
    shutil.copytree(one, tmp_path / "moved" / one.name)
    assert key(one) == key(tmp_path / "moved" / one.name) != key(write_student(tmp_path / "other", seed=2))
