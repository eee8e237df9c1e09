"""The tracked ladder at full size: every job accepts the geometries that the ladder gives it. No weights are read."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.config import RunConfig, fit_report, geometry_diff, load_config
from megatron_vpmoe.config.parameters import is_trained, parameter_sizes
from megatron_vpmoe.errors import ConfigError
from vpmoe.hf.convert import Carried
from vpmoe.upcycle import depth, experts, morph, runner, shape
from vpmoe.upcycle.inputs import Input
from vpmoe.upcycle.job import Task
from vpmoe.upcycle.ladder_file import ObjectSpec, geometry, read_ladder
from vpmoe.upcycle.rung_below import RungBelow, layer_and_name, refuse_other_changes
from vpmoe.upcycle.training_jobs import Heal, TrainingSettings, training_config


def task_and_below(identifier: str) -> tuple[Task[Any], RungBelow]:
    ladder = read_ladder()
    spec = ladder.get(identifier)
    lower = ladder.get(spec.inputs["model"])
    new, old = geometry(spec), geometry(lower)
    assert new is not None and old is not None
    _, settings = runner.job_and_settings(ladder, spec)
    task = Task(spec, new, {"model": Input(lower, old, {}, None)}, settings, Path(), lambda _what, _size: None)
    return task, RungBelow(old, {}, Carried(old.model.padded_vocab_size), [])


def test_no_job_knows_other_layers(repository: Path) -> None:
    state_space = str(repository / "configs" / "think" / "state_space.yaml")
    with pytest.raises(ConfigError, match="layers of type state_space"):
        geometry(read_ladder().get("vpdense_28").model_copy(update={"config": state_space, "overrides": {}}))


def test_rungs_three_to_six(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    task, below = task_and_below("vpdense0_5_28")
    refuse_other_changes(task, below, shape._CHANGED)
    shape._check(below.cfg, task.cfg, source="")

    task, below = task_and_below("vpdense_28")
    morph._check(task, below)
    ledger = morph.switches(task.cfg, below.cfg, endless=200)
    assert [name for name, (_, exact) in ledger.items() if exact] == [
        "local_position_embedding",
        "value_residual",
        "window_size",
        "all_exact",
    ]  # R_q = 4 < 8 heads: tpa is not

    task, below = task_and_below("vpdense_80")
    refuse_other_changes(task, below, {"num_layers"})
    assert len(depth.layer_sources(below.cfg, task.cfg, source="")) == 80

    task, below = task_and_below("vpmoe")
    refuse_other_changes(task, below, set(type(task.cfg.moe).model_fields))
    conversion = experts.Conversion.of(task.cfg, below.cfg, task.settings, source="")
    assert (conversion.slices, conversion.scale, conversion.bias_scale) == (4, pytest.approx(0.8), pytest.approx(0.2))


def run_of(spec: ObjectSpec) -> RunConfig:
    """The configuration of a healing."""
    job, settings = runner.job_and_settings(read_ladder(), spec)
    assert isinstance(job, Heal) and isinstance(settings, TrainingSettings)
    return training_config(spec, settings)


STAGES = ("vpmoe-stage1", "vpmoe-stage2", "vpmoe-stage3")
HEALED = ("qwen3-0_6B-o200k", "vpdense0_5_28", "vpdense_28", "vpdense_80", "vpmoe")


@pytest.mark.parametrize("rung", HEALED)
def test_healing(rung: str, repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One or two trainings lead from a conversion to what the next rung is made from; eight GPUs of 80 GB hold them."""
    monkeypatch.chdir(repository)
    ladder = read_ladder()
    healed = ladder.get(f"{rung}-healed")
    uses = [spec.id for spec in ladder.objects.values() if healed.id in spec.inputs.values()]
    assert uses == [[*HEALED, STAGES[0]][HEALED.index(rung) + 1]]
    steps = [healed]
    while steps[-1].id != rung:
        steps.append(ladder.get(steps[-1].inputs["model"]))
    assert [spec.id.removeprefix(rung) for spec in steps[::-1]] in (["", "-healed"], ["", "-settled", "-healed"])
    for spec in steps[:-1]:
        cfg, declared = run_of(spec), geometry(spec)
        assert declared is not None
        assert geometry_diff(declared, cfg) == []
        assert fit_report(cfg, 80 * 2**30, "NVIDIA", device_count=8).fits
        assert (cfg.training.train_only is not None) == spec.id.endswith("-settled")


def test_stages(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes on from the one before, by its own configuration, on the last rung's geometry."""
    monkeypatch.chdir(repository)
    ladder = read_ladder()
    assert ladder.target == STAGES[-1]
    below = "vpmoe-healed"
    for number, identifier in enumerate(STAGES, 1):
        spec = ladder.get(identifier)
        assert (spec.inputs["model"], spec.rung) == (below, 6 + number)
        cfg, below = run_of(spec), identifier
        assert fit_report(cfg, 80 * 2**30, "NVIDIA", device_count=8).fits
        own = load_config(Path(f"configs/vpmoe_stage{number}.yaml")).training
        assert (cfg.training.objective, cfg.training.train_iters) == (own.objective, own.train_iters)


def test_the_new_layers_are_trained_first(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(repository)
    task, below = task_and_below("vpdense_80")
    layers = depth.layer_sources(below.cfg, task.cfg, source="")
    cfg = run_of(read_ladder().get("vpdense_80-settled"))
    trained = {name: layer_and_name(name) for name in parameter_sizes(cfg) if is_trained(cfg, name)}
    assert {place[0] for place in trained.values() if place} == {i for i, (_, is_new) in enumerate(layers) if is_new}
    assert None not in trained.values()
    healed = run_of(read_ladder().get("vpdense_80-healed"))
    slower = [m.pattern for m in healed.optim.lr_multipliers or []]
    old = [f"decoder.layers.{i}.input_layernorm.weight" for i, (_, is_new) in enumerate(layers) if not is_new]
    matched = [name for name in parameter_sizes(cfg) for pattern in slower if fnmatch.fnmatch(name, pattern)]
    assert [name for name in matched if name.endswith("input_layernorm.weight")] == old
