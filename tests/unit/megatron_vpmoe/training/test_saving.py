"""A checkpoint that is written while training goes on: the same files, whole or not there, whatever happens."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.optim import build_optimizer, build_scheduler
from megatron_vpmoe.training import checkpoint, checkpoint_part
from megatron_vpmoe.training.checkpoint_files import find_newest
from megatron_vpmoe.training.retention import Retention
from tests.tiny import tiny_config
from tests.training_runs import checkpoint_tensors

Parts = tuple[Any, Any, Any]


@pytest.fixture
def parts(single_process: None) -> Parts:
    cfg = tiny_config(num_layers=2, num_experts=None)
    model = build_model(cfg)
    optimizer = build_optimizer([model], cfg)
    return model, optimizer, build_scheduler(optimizer, cfg)


def change(parts: Parts) -> None:
    """As a step does: in place."""
    with torch.no_grad():
        for parameter in parts[0].parameters():
            parameter.add_(1.0)


def begin(folder: Path, iteration: int, parts: Parts, **options: Any) -> checkpoint.Saving:
    return checkpoint.save(folder, {"iteration": iteration, "world_size": 1}, *parts, copy=True, **options)


def held(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Writing waits until what is returned is called."""
    go, write = threading.Event(), checkpoint_part.Part.write

    def late(self: checkpoint_part.Part) -> checkpoint_part.Written:
        assert go.wait(60)
        return write(self)

    monkeypatch.setattr(checkpoint_part.Part, "write", late)
    return go.set


def test_what_is_written_is_the_state_that_was_saved(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once = checkpoint.save(tmp_path / "at once", {"iteration": 1, "world_size": 1}, *parts).wait()
    go = held(monkeypatch)
    saving = begin(tmp_path / "later", 1, parts)
    change(parts)
    assert not saving.advance() and find_newest(tmp_path / "later") == (None, [])
    go()
    later = saving.wait()
    assert (later / "__0_0.distcp").read_bytes() == (at_once / "__0_0.distcp").read_bytes()
    assert (later / "common.pt").read_bytes() == (at_once / "common.pt").read_bytes()
    same, expected = checkpoint_tensors(later), checkpoint_tensors(at_once)
    assert same.keys() == expected.keys() and all(torch.equal(same[key], expected[key]) for key in same)
    found, damaged = find_newest(tmp_path / "later")
    assert found is not None and found.path == later and not damaged


def test_older_ones_go_only_once_the_new_one_stands(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeping = Retention(tmp_path, keep_last=1, keep_every=None)
    first = begin(tmp_path, 1, parts, then=keeping.prune).wait()
    go = held(monkeypatch)
    saving = begin(tmp_path, 2, parts, then=keeping.prune)
    assert not saving.advance() and first.exists()
    go()
    saving.wait()
    assert not first.exists() and saving.path.exists() and saving.notes == []
    assert 0 < saving.waited < saving.seconds + 0.1


def test_a_write_that_fails_is_raised_when_it_is_asked_for_and_leaves_nothing(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = begin(tmp_path, 1, parts).wait()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    saving = begin(tmp_path, 2, parts)
    with pytest.raises(CheckpointError, match="No space left on device"):
        saving.wait()
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == [before.name]
    assert begin(tmp_path, 2, parts).wait().exists()


def test_memory_that_does_not_hold_a_copy_is_named(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none_left(*_: Any) -> None:
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(checkpoint_part, "_Copies", none_left)
    with pytest.raises(CheckpointError, match="can't allocate memory") as error:
        begin(tmp_path, 1, parts)
    assert "--no-async-save" in str(error.value) and not list(tmp_path.iterdir())


def test_writing_a_copy_asks_nothing_of_a_gpu(tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else it would wait for the training's own work, again and again."""
    go = held(monkeypatch)
    saving = begin(tmp_path, 1, parts)
    with monkeypatch.context() as patched:
        patched.setattr(torch.cuda, "is_available", lambda: True)
        go()
        while not saving._work.done():
            threading.Event().wait(0.01)
    assert saving.wait().exists()


class Killed(BaseException):
    """As a kill: nothing catches it."""


@pytest.mark.slow
def test_a_kill_at_any_point_leaves_the_old_or_the_new_one_complete(
    tmp_path: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before each call that makes a name or a content last, in turn, pruning included."""
    monkeypatch.setattr(checkpoint, "give_up", lambda _: None)
    keeping = Retention(tmp_path, keep_last=1, keep_every=None)
    newest, ends = begin(tmp_path, 1, parts, then=keeping.prune).wait(), set[str]()
    for killed_at in range(100):
        left = killed_at

        def counted(real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise Killed
                return real(*arguments, **options)

            return call

        killed = False
        with monkeypatch.context() as patched:
            for name in ("fsync", "rename", "replace"):
                patched.setattr(os, name, counted(getattr(os, name)))
            saving = begin(tmp_path, killed_at + 2, parts, then=keeping.prune)
            try:
                saving.wait()
            except Killed:
                killed = True
        found, damaged = find_newest(tmp_path)
        assert found is not None and not damaged and found.path in (newest, saving.path)
        ends.add("old" if found.path == newest else "new" if killed else "done")
        newest = found.path
        if not killed:
            break
    assert ends == {"old", "new", "done"} and killed_at > 10
