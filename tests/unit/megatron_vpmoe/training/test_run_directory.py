"""Whose a run directory is, and from which checkpoint a run in it may go on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.errors import BusyError, CheckpointError, NotOursError, VpmoeError
from megatron_vpmoe.files import json_bytes, list_files
from megatron_vpmoe.launch import preflight
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.training import failure_policy
from megatron_vpmoe.training.checkpoint_files import TRACKER, begin, seal
from megatron_vpmoe.training.provenance import collect_provenance
from megatron_vpmoe.training.run_directory import continued, ownership, restorable
from tests.any_json import changed_json
from tests.conftest import fuzz_settings
from tests.fixtures_dataset import small_dataset
from tests.tiny import ROOT, tiny_config


@pytest.fixture
def cfg(tmp_path: Path):
    data = small_dataset(tmp_path / "set")
    return tiny_config(data_path=data, run_dir=tmp_path / "run", resume=True)


def written(cfg, iteration: int, **changes: object) -> Path:
    final = cfg.run_directory / "checkpoints" / f"iter_{iteration:07d}"
    partial = begin(final)
    (partial / "common.pt").write_bytes(b"weights")
    state = {
        "iteration": iteration,
        "world_size": 1,
        "consumed_samples": 4 * iteration,
        "skipped_steps": 0,
        "config": cfg.model_dump(mode="json"),
        "provenance": collect_provenance(cfg, [read_manifest(cfg.data.data_path)]),
    }
    seal(partial, final, {**state, **changes})
    return final


def spoil(path: Path) -> None:
    (path / "common.pt").write_bytes(b"wEights")


def test_nothing_there_is_a_start(cfg) -> None:
    assert continued(cfg) == (None, [])
    (cfg.run_directory / "checkpoints" / "iter_0000005.partial").mkdir(parents=True)
    assert continued(cfg) == (None, [])


def test_a_fresh_start_keeps_what_a_run_before_has_logged(cfg) -> None:
    """Its checkpoints were moved to an archive, say."""
    directory = cfg.run_directory
    directory.mkdir(parents=True)
    for attempt in ("first", "second"):
        (directory / "metrics.jsonl").write_text(attempt)
        found, notes = continued(cfg)
        assert found is None and len(notes) == 1 and not (directory / "metrics.jsonl").exists()
    kept = {path.name: path.read_text() for path in directory.iterdir()}
    assert kept == {"metrics.jsonl.before": "first", "metrics.jsonl.before.2": "second"}


def test_damaged_ones_lose_the_name_and_are_named(cfg) -> None:
    older, newer = written(cfg, 6), written(cfg, 9)
    spoil(newer)
    assert restorable(cfg)[0].path == older and newer.exists()  # reads only
    found, notes = continued(cfg)
    assert found is not None and found.path == older
    assert any(str(newer) in note and "sha256" in note for note in notes)
    assert not newer.exists() and (newer.parent / "iter_0000009.damaged").is_dir()


@pytest.mark.parametrize("stated", ["9", "", "nine", "12\n", None, "folder"])
def test_a_tracker_that_names_what_is_not_there_is_named(cfg, tmp_path: Path, stated: str | None) -> None:
    """The newest checkpoint is taken all the same, but not under strict_resume; one that lags behind says nothing."""
    newest = written(cfg, 6)
    tracker = newest.parent / TRACKER
    strict = tiny_config(data_path=cfg.data.data_path, run_dir=cfg.run_directory, resume=True, strict_resume=True)
    for behind in ("6\n", "3\n"):
        tracker.write_text(behind)
        assert continued(strict)[1] == []
    tracker.unlink()
    assert continued(strict)[1] == []
    match stated:
        case None:
            tracker.symlink_to(tmp_path / "nowhere")
        case "folder":
            tracker.mkdir()
            (tracker / "mine.txt").write_text("kept")
        case _:
            tracker.write_text(stated)
    with pytest.raises(CheckpointError, match=TRACKER) as caught:
        continued(strict)
    assert "iter_0000006" in str(caught.value) and "--strict-resume" in str(caught.value)
    found, (note,) = continued(cfg)
    assert found is not None and found.path == newest and f"passed over {tracker}" in note
    assert tracker.read_text() == "6\n" and continued(strict)[1] == []
    assert stated != "folder" or (tracker.with_name(f"{TRACKER}.damaged") / "mine.txt").read_text() == "kept"


def test_a_damaged_newer_checkpoint_ends_a_strict_run_and_stays_where_it_is(cfg) -> None:
    strict = tiny_config(data_path=cfg.data.data_path, run_dir=cfg.run_directory, resume=True, strict_resume=True)
    (cfg.run_directory / "checkpoints").mkdir(parents=True)
    assert continued(strict) == (None, [])
    (cfg.run_directory / "checkpoints" / TRACKER).write_text("9\n")
    with pytest.raises(CheckpointError, match="nothing sound"):
        continued(strict)
    assert "iteration 9" in str(continued(cfg)[1])
    older, newer = written(cfg, 6), written(cfg, 9)
    spoil(newer)
    for look in (restorable, continued):
        with pytest.raises(CheckpointError, match=r"iter_0000006 is the newest sound one") as caught:
            look(strict)
        assert f"{newer}: common.pt" in str(caught.value) and newer.exists()
    assert continued(cfg)[0].path == older


def test_what_a_killed_run_had_begun_to_write_goes_and_nothing_else(cfg) -> None:
    checkpoints = cfg.run_directory / "checkpoints"
    checkpoints.mkdir(parents=True)
    ours = [cfg.run_directory / f".{name}.71.tmp" for name in ("metrics.jsonl", "spike_0000010_rank3_2.json")]
    ours.append(checkpoints / f".{TRACKER}.71.tmp")
    users = [cfg.run_directory / name for name in (".notes.71.tmp", ".metrics.jsonl.tmp", "metrics.jsonl.71.tmp")]
    for path in (*ours, *users):
        path.write_text("x")
    continued(cfg)
    assert [path.exists() for path in (*ours, *users)] == [False] * 3 + [True] * 3


def test_after_a_kill_within_a_rollback_the_tracker_names_what_is_there(cfg, monkeypatch: pytest.MonkeyPatch) -> None:
    older, newer = written(cfg, 6), written(cfg, 9)
    set_aside = failure_policy.set_aside

    def killed(*arguments: str) -> None:
        set_aside(*arguments)
        raise KeyboardInterrupt

    monkeypatch.setattr(failure_policy, "set_aside", killed)
    run = SimpleNamespace(directory=cfg.run_directory, iteration=9, spikes=SimpleNamespace(returned_to=newer))
    with pytest.raises(KeyboardInterrupt):
        failure_policy._before(run)
    assert not newer.exists()
    strict = tiny_config(data_path=cfg.data.data_path, run_dir=cfg.run_directory, resume=True, strict_resume=True)
    assert continued(strict)[0].path == older


@pytest.mark.parametrize("resume", [True, False])
def test_only_damaged_ones_are_no_start(cfg, tmp_path: Path, resume: bool) -> None:
    cfg = tiny_config(data_path=cfg.data.data_path, run_dir=cfg.run_directory, resume=resume)
    for number in (6, 9):
        spoil(written(cfg, number))
    for _ in range(2):
        with pytest.raises(CheckpointError) as caught:
            continued(cfg)
        assert "iter_0000006" in str(caught.value) and "iter_0000009" in str(caught.value)
        assert "--run-name" in str(caught.value)
    assert len(list((cfg.run_directory / "checkpoints").glob("iter_???????"))) == 2
    # Nor where a run before has set them aside.
    for number in (6, 9):
        path = cfg.run_directory / "checkpoints" / f"iter_{number:07d}"
        path.rename(path.with_name(f"{path.name}.damaged"))
    with pytest.raises(CheckpointError, match=r"iter_0000009\.damaged"):
        continued(cfg)


def test_a_folder_of_checkpoints_that_is_none_is_refused(cfg) -> None:
    cfg.run_directory.mkdir()
    (cfg.run_directory / "checkpoints").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot be read"):
        continued(cfg)


@pytest.mark.parametrize("changes", [{"provenance": None}, {"config": []}, {"consumed_samples": "8"}])
def test_weights_alone_are_not_continued(cfg, changes: dict[str, object]) -> None:
    written(cfg, 0, **changes)
    with pytest.raises(CheckpointError, match=f"does not say {next(iter(changes))}"):
        continued(cfg)


def test_a_config_that_no_run_wrote_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    with pytest.raises(NotOursError, match=r"config\.yaml"), ownership(tmp_path):
        pass
    (tmp_path / "config.yaml").rename(tmp_path / "own.yaml")
    with ownership(tmp_path):
        (tmp_path / "config.yaml").write_text("a run's\n")
    with ownership(tmp_path):
        pass


HOLDER = """
import sys, time
from pathlib import Path
from megatron_vpmoe.training.run_directory import ownership
with ownership(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.slow
def test_another_process_at_work_is_named_and_a_dead_one_is_no_hindrance(cfg) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT / 'Megatron-vpmoe'}:{ROOT}"}
    command = [sys.executable, "-c", HOLDER, str(cfg.run_directory)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for look in (lambda: preflight.check_run_directory(cfg), lambda: ownership(cfg.run_directory).__enter__()):
            with pytest.raises(BusyError, match=f"process {holder.pid} on"):
                look()
        holder.kill()
    preflight.check_run_directory(cfg)
    with ownership(cfg.run_directory) as former:
        assert former is not None and former["pid"] == holder.pid
    with ownership(cfg.run_directory) as former:
        assert former is None


@fuzz_settings(40)
@given(data=st.data())
def test_a_state_of_any_shape_is_refused_or_continued(cfg, data: st.DataObject) -> None:
    path = cfg.run_directory / "checkpoints" / "iter_0000005"
    if not path.exists():
        written(cfg, 5, data=[])
        path.with_name("state").write_bytes((path / "run_state.json").read_bytes())
    state = json.loads(path.with_name("state").read_bytes())
    (path / "run_state.json").write_text(json.dumps(data.draw(changed_json(state))))
    (path / "files.json").write_bytes(json_bytes(list_files(path, leave_out=["files.json"])))
    try:
        found, _, _ = restorable(cfg)
        assert found is not None and found.iteration == 5 and found.state["consumed_samples"] >= 0
    except VpmoeError as error:
        assert str(path) in str(error)
