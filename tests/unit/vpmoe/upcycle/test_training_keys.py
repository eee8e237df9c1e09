"""The key of a training of a ladder: what decides its weights, wherever that lies."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from tests.fixtures_dataset import small_dataset
from tests.tiny import ROOT, tiny_config
from tests.tiny_student import write_student
from vpmoe.errors import UpcycleError
from vpmoe.upcycle import training_jobs
from vpmoe.upcycle.ladder_file import ObjectSpec
from vpmoe.upcycle.training_jobs import Heal, Pretrain, TrainingSettings


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


def stage(**changes: Any) -> tuple[ObjectSpec, TrainingSettings]:
    """Stage 2 or 3 of the nano ladder, with changes of its settings; ``inputs`` are of the object."""
    inputs = changes.pop("inputs", {"model": "below", "teacher": "of_the_ladder"})
    config = str(ROOT / "configs" / "nano" / "vpmoe_16.yaml")
    spec = ObjectSpec(id="stage", rung=8, path="stage", job="heal", config=config, inputs=inputs)
    settings = {"config": str(ROOT / "configs" / "nano" / "stage3.yaml"), "overrides": {"num_layers": 16}, **changes}
    return spec, TrainingSettings.model_validate(settings)


STAGE_2 = {"config": str(ROOT / "configs" / "nano" / "stage2.yaml"), "score": "--top-k 64"}


def test_what_a_stage_names_for_a_run_by_itself_gives_way_to_the_ladder() -> None:
    """Its weights to begin with and its teacher; the rest is the stage's, and the geometry the object's."""
    cfg = training_jobs.training_config(*stage())
    assert (cfg.checkpoint.load_weights, cfg.training.teacher_weights) == (None, "teacher")
    assert (cfg.training.objective, cfg.model.num_layers) == ("on_policy", 16)
    alone = training_jobs.training_config(*stage(inputs={"model": "below"}))
    assert alone.training.teacher_weights == "runs/nano_teacher"
    assert training_jobs.training_config(*stage(**STAGE_2)).training.objective == "topk_kd"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"overrides": {"num_layers": 16, "load_weights": "runs/x"}}, "load_weights: the job decides that"),
        ({"overrides": {"num_layers": 16, "teacher_weights": "runs/x"}}, "teacher_weights: the job decides that"),
        ({"overrides": {"num_layers": 16, "run_dir": "runs/x"}}, "run_dir: the job decides that"),
        ({"score": "--top-k 8"}, "on_policy with the inputs model, teacher reads no records"),
        ({**STAGE_2, "inputs": {"model": "below"}}, "topk_kd with the inputs model reads no records"),
        ({"overrides": {}}, r"model\.num_layers: 16 -> 4"),
        ({"overrides": {"num_layers": 16, "eval_interval": "null"}}, "eval_interval is null"),
    ],
)
def test_a_stage_that_says_what_is_not_its_own(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UpcycleError, match=message):
        training_jobs.training_config(*stage(**changes))


def test_prompts_are_their_content_and_have_to_be_there(tmp_path: Path) -> None:
    dataset, prompts = small_dataset(tmp_path / "kd", train=4, valid=2), tmp_path / "prompts.jsonl"
    files = {"rollout_prompts": str(prompts), "rollout_valid_prompts": str(prompts)}

    def key() -> dict[str, Any]:
        overrides = {"num_layers": 16, "data_path": str(dataset), **files}
        return Heal().decides(*stage(overrides=overrides))

    with pytest.raises(UpcycleError, match=r"there are no prompts"):
        key()
    prompts.write_text("one\n")
    first = key()
    prompts.write_text("two\n")
    assert first != key() and "teacher_weights" not in first["training"]["training"]
