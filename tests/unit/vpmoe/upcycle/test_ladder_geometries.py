"""The tracked ladder at full size: every job accepts the geometries that the registry gives it. No weights are read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from vpmoe.upcycle import depth, experts, morph, runner, shape
from vpmoe.upcycle.job import Input, Task
from vpmoe.upcycle.registry import geometry, load_registry
from vpmoe.upcycle.rung_below import RungBelow, refuse_other_changes


def task_and_below(identifier: str) -> tuple[Task[Any], RungBelow]:
    registry = load_registry()
    spec = registry.get(identifier)
    lower = registry.get(spec.inputs["model"])
    new, old = geometry(spec), geometry(lower)
    assert new is not None and old is not None
    _, settings = runner._read_job(spec)
    task = Task(spec, new, {"model": Input(lower, old, {}, None)}, settings, Path(), lambda _what, _size: None)
    return task, RungBelow(old, {}, old.model.padded_vocab_size, {}, [])


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
    assert len(depth.layer_sources(below.cfg, task.cfg, task.settings.placement, source="")) == 80

    task, below = task_and_below("vpmoe")
    refuse_other_changes(task, below, set(type(task.cfg.moe).model_fields))
    conversion = experts.Conversion.of(task.cfg, below.cfg, task.settings, source="")
    assert (conversion.slices, conversion.scale, conversion.bias_scale) == (4, pytest.approx(0.8), pytest.approx(0.2))
