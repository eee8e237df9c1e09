"""Checkpoints on disk: which of them count, which stay, and that nothing of a user's goes."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.files import file_entry, json_bytes
from megatron_vpmoe.training import checkpoint_files, retention
from megatron_vpmoe.training.checkpoint_files import begin, damage, find_newest, open_checkpoint, seal
from megatron_vpmoe.training.retention import Retention

DATA = "__0_0.distcp"


def written(directory: Path, iteration: int) -> Path:
    """A checkpoint with the files of a real one, small."""
    final = directory / f"iter_{iteration:07d}"
    partial = begin(final)
    for name in (DATA, ".metadata", "common.pt", "metadata.json"):
        (partial / name).write_bytes(f"{name} of {iteration}".encode() * 10)
    (partial / "assets").mkdir()
    (partial / "assets" / "tokenizer.json").write_text("{}")
    seal(partial, final, {"iteration": iteration, "world_size": 1})
    return final


def spoil(path: Path) -> Path:
    """Another byte at the same length."""
    content = (path / DATA).read_bytes()
    (path / DATA).write_bytes(content[:-1] + b"?")
    return path


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("iter_*"))


def kept(directory: Path, written_now: Path, **options: Any) -> list[str]:
    return Retention(directory, **{"keep_last": 2, "keep_every": None, **options}).prune(written_now)


def test_damaged_checkpoints_are_not_counted(tmp_path: Path) -> None:
    """The run goes on from 6, for 9 and 12 are damaged; after it has saved 8, both 6 and 8 are there."""
    restored = written(tmp_path, 6)
    damaged = [spoil(written(tmp_path, number)) for number in (9, 12)]
    found, passed_over = find_newest(tmp_path)
    assert found is not None and found.path == restored
    assert [line.path for line in passed_over] == damaged[::-1]
    notes = kept(tmp_path, written(tmp_path, 8), restored_from=restored)
    assert names(tmp_path) == ["iter_0000006", "iter_0000008", "iter_0000009.damaged", "iter_0000012.damaged"]
    assert len(notes) == 2 and all("sha256" in note for note in notes)
    assert damage(restored) is None


def test_the_newest_stay_and_multiples(tmp_path: Path) -> None:
    keeping = Retention(tmp_path, keep_last=2, keep_every=4)
    for number in range(1, 8):
        assert keeping.prune(written(tmp_path, number)) == []
    assert names(tmp_path) == [f"iter_{number:07d}" for number in (4, 6, 7)]


def test_what_was_written_and_what_was_restored_stay(tmp_path: Path) -> None:
    """Also where others are newer."""
    first, second = written(tmp_path, 1), written(tmp_path, 2)
    for number in (3, 10, 11):
        written(tmp_path, number)
    kept(tmp_path, second, keep_last=1, restored_from=first)
    assert names(tmp_path) == [f"iter_{number:07d}" for number in (1, 2, 11)]


def test_hashes_are_compared_once_and_only_where_something_would_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checked: list[str] = []
    real = checkpoint_files.damage

    def watched(path: Path, *, check_hashes: bool = True) -> str | None:
        checked.extend([path.name] if check_hashes else [])
        return real(path, check_hashes=check_hashes)

    monkeypatch.setattr(retention, "damage", watched)
    for number in (1, 2):
        written(tmp_path, number)
    keeping = Retention(tmp_path, keep_last=3, keep_every=None)
    keeping.prune(written(tmp_path, 3))
    assert checked == []
    keeping.prune(written(tmp_path, 4))
    assert checked == ["iter_0000002"]
    keeping.prune(written(tmp_path, 5))
    assert checked == ["iter_0000002"] and names(tmp_path) == [f"iter_{number:07d}" for number in (3, 4, 5)]


def test_one_that_lost_a_file_since_is_not_counted(tmp_path: Path) -> None:
    keeping = Retention(tmp_path, keep_last=2, keep_every=None)
    for number in (1, 2):
        keeping.prune(written(tmp_path, number))
    (tmp_path / "iter_0000002" / DATA).write_bytes(b"cut")
    (note,) = keeping.prune(written(tmp_path, 3))
    assert names(tmp_path) == ["iter_0000001", "iter_0000002.damaged", "iter_0000003"] and "bytes" in note


def test_what_cannot_be_removed_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, *_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    keeping = Retention(tmp_path, keep_last=1, keep_every=None, restored_from=None)
    keeping_all = [written(tmp_path, number) for number in (1, 2, 3)]
    keeping_all[0].rename(tmp_path / "iter_0000001.pruned")
    monkeypatch.setattr(shutil, "rmtree", refuse)
    notes = keeping.prune(keeping_all[-1])
    assert len(notes) == 2 and all("Permission denied" in note for note in notes)
    monkeypatch.undo()
    keeping.prune(keeping_all[-1])
    assert names(tmp_path) == ["iter_0000003"]


def test_older_ones_are_checked_before_one_goes_for_their_sake(tmp_path: Path) -> None:
    """Another run wrote 2 and 3, this one is of no use to tell whether they are sound."""
    for number in (1, 2, 3):
        written(tmp_path, number)
    spoil(tmp_path / "iter_0000003")
    kept(tmp_path, written(tmp_path, 4))
    assert names(tmp_path) == ["iter_0000002", "iter_0000003.damaged", "iter_0000004"]


@pytest.mark.parametrize("name", ["files.json", "run_state.json"])
@pytest.mark.parametrize(
    "content",
    [b"", b"[]", b"null", b"{}", b"7", b'"text"', b"[" * 100_000, b"\xff\xfe{}", b'{"x": 1}', b'{"x": {"bytes": "1"}}'],
)
def test_metadata_of_another_shape_is_damage(tmp_path: Path, name: str, content: bytes) -> None:
    """Even where the list of files agrees with it."""
    older, newer = written(tmp_path, 1), written(tmp_path, 2)
    (newer / name).write_bytes(content)
    if name == "run_state.json":
        entries = {path.name: file_entry(path) for path in (newer / name, newer / DATA)}
        (newer / "files.json").write_bytes(json_bytes(entries))
    assert name in (damage(newer) or "")
    assert name in (damage(newer, check_hashes=False) or "")
    found, passed_over = find_newest(tmp_path)
    assert found is not None and found.path == older and name in str(passed_over[0])
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(newer)
    kept(tmp_path, written(tmp_path, 3))
    assert names(tmp_path) == ["iter_0000001", "iter_0000002.damaged", "iter_0000003"]


@pytest.mark.parametrize("name", ["files.json", "run_state.json", DATA])
def test_a_folder_in_a_file_s_place_is_damage(tmp_path: Path, name: str) -> None:
    path = written(tmp_path, 1)
    (path / name).unlink()
    (path / name).mkdir()
    assert name in (damage(path) or "")


def test_an_unreadable_file_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = written(tmp_path, 1)

    def refuse(*_: object) -> str:
        raise PermissionError(13, "Permission denied", DATA)

    monkeypatch.setattr("megatron_vpmoe.files.sha256_of_file", refuse)
    assert "Permission denied" in (damage(path) or "")


def test_a_checkpoint_under_another_s_name_is_damage(tmp_path: Path) -> None:
    path = written(tmp_path, 1)
    path.rename(tmp_path / "iter_0000005")
    assert "iteration 1" in (damage(tmp_path / "iter_0000005") or "")


@pytest.mark.parametrize("kind", ["file", "link", "broken link", "folder"])
@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_what_bears_a_checkpoint_s_name_is_set_aside_by_the_save(tmp_path: Path, kind: str, suffix: str) -> None:
    target, in_the_way = tmp_path / "elsewhere", tmp_path / f"iter_0000003{suffix}"
    target.mkdir()
    (target / "mine.txt").write_text("kept")
    match kind:
        case "file":
            in_the_way.write_text("kept")
        case "link":
            in_the_way.symlink_to(target)
        case "broken link":
            in_the_way.symlink_to(tmp_path / "nowhere")
        case _:
            shutil.copytree(target, in_the_way)
    final = written(tmp_path, 3)
    assert damage(final) is None and not final.is_symlink()
    aside = tmp_path / f"iter_0000003{suffix}.damaged"
    match kind:
        case "file":
            assert aside.read_text() == "kept"
        case "broken link":
            assert aside.is_symlink()
        case _:
            assert (aside / "mine.txt").read_text() == "kept"
    assert (target / "mine.txt").read_text() == "kept"


def test_damaged_ones_of_one_name_get_different_names(tmp_path: Path) -> None:
    for content in "abc":
        (tmp_path / "iter_0000003").write_text(content)
        checkpoint_files.set_aside(tmp_path / "iter_0000003")
    found = {path.name: path.read_text() for path in tmp_path.glob("iter_*")}
    assert found == {"iter_0000003.damaged": "a", "iter_0000003.damaged.2": "b", "iter_0000003.damaged.3": "c"}


def test_a_sound_one_of_the_same_name_stays_beside_the_new_one(tmp_path: Path) -> None:
    content = (written(tmp_path, 3) / DATA).read_bytes()
    written(tmp_path, 3)
    assert names(tmp_path) == ["iter_0000003", "iter_0000003.replaced"]
    assert (tmp_path / "iter_0000003.replaced" / DATA).read_bytes() == content


@pytest.mark.parametrize("removed", [[], ["files.json"], [DATA, "run_state.json"], [DATA, "files.json", "assets"]])
def test_a_removal_that_was_killed_is_finished_by_the_next(tmp_path: Path, removed: list[str]) -> None:
    paths = [written(tmp_path, number) for number in (1, 2)]
    pruned, partial = (path.with_suffix(suffix) for path, suffix in zip(paths, (".pruned", ".partial"), strict=True))
    for path, aside in zip(paths, (pruned, partial), strict=True):
        path.rename(aside)
    for name in removed:
        path = pruned / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    assert find_newest(tmp_path) == (None, [])
    kept(tmp_path, written(tmp_path, 3))
    assert names(tmp_path) == ["iter_0000003"]
    assert not partial.exists()


def test_what_a_user_put_into_a_checkpoint_stays(tmp_path: Path) -> None:
    mine = written(tmp_path, 1) / "hf" / "model.safetensors"
    mine.parent.mkdir()
    mine.write_text("exported")
    also_mine = tmp_path / "iter_0000002.pruned" / "notes.txt"
    also_mine.parent.mkdir()
    also_mine.write_text("looked at")
    keeping = Retention(tmp_path, keep_last=1, keep_every=None)
    said = [keeping.prune(written(tmp_path, number)) for number in (3, 4)]
    assert mine.read_text() == "exported" and also_mine.read_text() == "looked at"
    assert damage(tmp_path / "iter_0000001") is None
    assert len(said[0]) == 1 and "iter_0000001 stays" in said[0][0] and said[1] == []


def test_links_are_read_and_never_removed(tmp_path: Path) -> None:
    elsewhere, here = tmp_path / "big_disk", tmp_path / "checkpoints"
    here.mkdir()
    for number in (1, 5):
        (here / f"iter_{number:07d}").symlink_to(written(elsewhere, number))
    found, _ = find_newest(here)
    assert found is not None and found.iteration == 5
    kept(here, written(here, 6), keep_last=1)
    assert names(here) == [f"iter_{number:07d}" for number in (1, 5, 6)]
    assert all(damage(elsewhere / name) is None for name in names(elsewhere))


def test_who_takes_an_older_one_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    directory = tmp_path / "run" / "checkpoints"
    older, newer = written(directory, 1), spoil(written(directory, 2))
    assert open_checkpoint(tmp_path / "run").path == older
    said = capsys.readouterr().err
    assert str(newer) in said and "sha256" in said and "iter_0000001 is used" in said
    checkpoint_files.set_aside(newer)
    assert open_checkpoint(tmp_path / "run").path == older
    assert "iter_0000002.damaged" in capsys.readouterr().err
    assert open_checkpoint(older).path == older
    newest = written(directory, 3)
    assert open_checkpoint(directory).path == newest
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("kind", ["file", "broken link"])
def test_checkpoints_that_cannot_be_listed_are_no_empty_folder(tmp_path: Path, kind: str) -> None:
    directory = tmp_path / "checkpoints"
    directory.write_text("x") if kind == "file" else directory.symlink_to(tmp_path / "nowhere")
    for search in (lambda: find_newest(directory), lambda: open_checkpoint(tmp_path)):
        with pytest.raises(CheckpointError, match="cannot be read"):
            search()
