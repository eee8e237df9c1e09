"""Every kind of file of a checkpoint, damaged in every way: named, passed over, refused under strict_resume, kept."""

from __future__ import annotations

import errno
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.files import file_entry
from megatron_vpmoe.training.checkpoint_files import TRACKER, damage, open_checkpoint
from megatron_vpmoe.training.run_directory import continued, restorable
from tests import training_runs
from tests.crash.phases import SAMPLED
from tests.fixtures_dataset import small_dataset

pytestmark = pytest.mark.slow
FILES = (
    "__0_0.distcp",
    ".metadata",
    "common.pt",
    "metadata.json",
    "run_state.json",
    "files.json",
    "position.npz",
    "assets/vocabulary.json",
)
Damage = Callable[[Path], None]


def _flipped(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[min(int(place * len(content)), len(content) - 1)] ^= 4
    path.write_bytes(content)


def _replaced(path: Path, make: Damage) -> None:
    path.unlink()
    make(path)


DAMAGES: dict[str, Damage] = {
    "truncated by two bytes": lambda path: os.truncate(path, path.stat().st_size - 2),  # JSON's last is a line feed
    "truncated to half": lambda path: os.truncate(path, path.stat().st_size // 2),
    "first byte flipped": lambda path: _flipped(path, 0.0),
    "byte within flipped": lambda path: _flipped(path, 0.4),
    "last byte flipped": lambda path: _flipped(path, 1.0),
    "missing": Path.unlink,
    "empty": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)) and None,
    "garbage": lambda path: path.write_bytes(b"\xff\xfe[" * path.stat().st_size) and None,
    "a folder": lambda path: _replaced(path, Path.mkdir),
    "a broken link": lambda path: _replaced(path, lambda link: link.symlink_to("nowhere")),
    "unreadable": lambda path: None,  # see `unreadable`
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run on its own answers, whose checkpoints have every kind of file: of steps 4 and 6. And its dataset."""
    folder = tmp_path_factory.mktemp("damage")
    dataset = small_dataset(folder / "dataset", train=64, valid=4)
    done = training_runs.train(folder / "run", dataset, **{**SAMPLED, "train_iters": 6, "keep_last": 2})
    assert done.returncode == 0, done.stderr
    return folder / "run", dataset


@pytest.fixture
def run(trained: tuple[Path, Path], tmp_path: Path) -> Callable[..., RunConfig]:
    """A copy of it, as the configuration that continues it."""
    shutil.copytree(trained[0], tmp_path / "run")

    def configured(**changes: Any) -> RunConfig:
        fields = {**SAMPLED, "train_iters": 6, "resume": True, **changes}
        _, _, _, file, *flags = training_runs.command(tmp_path / "run", trained[1], **fields)
        return load_config(file, flags)

    return configured


@pytest.fixture
def unreadable(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[Path]]:
    """Paths for which the system has an error of the disk; as root nothing else is refused."""
    paths, really = set[Path](), io.open

    def opened(path: Any, *arguments: Any, **named: Any) -> Any:
        if isinstance(path, Path) and path in paths:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return really(path, *arguments, **named)

    monkeypatch.setattr(io, "open", opened)
    return paths


def _contents(folder: Path) -> dict[str, Any]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() if path.is_file() else path.is_symlink()
        for path in folder.rglob("*")
    }


def test_a_checkpoint_has_these_files(trained: tuple[Path, Path]) -> None:
    newest = trained[0] / "checkpoints" / "iter_0000006"
    found = {path.relative_to(newest).as_posix() for path in newest.rglob("*") if path.is_file()}
    assert found == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_named_and_the_checkpoint_before_is_used(
    run: Callable[..., RunConfig], unreadable: set[Path], name: str
) -> None:
    """In turn, each in a copy of the sound checkpoint."""
    checkpoints = run().run_directory / "checkpoints"
    newest, sound = checkpoints / "iter_0000006", checkpoints.parent / "sound"
    shutil.copytree(newest, sound)
    older = _contents(checkpoints / "iter_0000004")
    for number, (kind, spoil) in enumerate(DAMAGES.items()):
        spoil(newest / name)
        if kind == "unreadable":
            unreadable.add(newest / name)
        left = {} if unreadable else _contents(newest)
        with pytest.raises(CheckpointError) as refused:
            restorable(run(strict_resume=True))
        with pytest.raises(CheckpointError) as opened:
            open_checkpoint(newest)
        assert newest.exists()
        found, notes = continued(run())
        assert found is not None and found.iteration == 4, kind
        said = [str(refused.value), str(opened.value), " ".join(notes)]
        # A list of files that lies is at odds with a file: with which one, is all that can be said.
        names = (name, *(f"{other} does not have the sha256" for other in FILES if name == "files.json"))
        assert all(any(each in text for each in names) and str(newest) in text for text in said), (kind, said)
        if kind == "unreadable":
            assert all("Input/output error" in each for each in said)
        aside = checkpoints / f"{newest.name}.damaged{f'.{number + 1}' if number else ''}"
        assert not newest.exists() and (not left or _contents(aside) == left), kind
        shutil.copytree(sound, newest)
        unreadable.clear()
    assert _contents(checkpoints / "iter_0000004") == older


def test_no_byte_of_the_list_of_files_changes_unseen(run: Callable[..., RunConfig]) -> None:
    """It has no hash of its own: where a changed byte passes, the list says what it said."""
    newest = run().run_directory / "checkpoints" / "iter_0000006"
    content = (newest / "files.json").read_bytes()
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1
        (newest / "files.json").write_bytes(changed)
        if damage(newest, check_hashes=False) is None and damage(newest) is None:
            assert json.loads(changed) == json.loads(content)


@pytest.mark.parametrize("kind", ["99\n", "", "zz", "\x00", "4" * 5000, "folder", "link", "EIO"])
def test_a_tracker_that_points_to_nothing_is_named_and_the_newest_is_used(
    run: Callable[..., RunConfig], unreadable: set[Path], kind: str
) -> None:
    tracker = run().run_directory / "checkpoints" / TRACKER
    match kind:
        case "folder":
            _replaced(tracker, Path.mkdir)
        case "link":
            _replaced(tracker, lambda path: path.symlink_to("nowhere"))
        case "EIO":
            unreadable.add(tracker)
        case _:
            tracker.write_text(kind)
    with pytest.raises(CheckpointError, match=TRACKER) as refused:
        continued(run(strict_resume=True))
    found, notes = continued(run())
    unreadable.clear()
    assert found is not None and found.iteration == 6 and "iter_0000006" in str(refused.value)
    assert any(str(tracker) in note for note in notes) and tracker.read_text() == "6\n"
    assert continued(run(strict_resume=True))[0] is not None


@pytest.mark.parametrize("place", ["beside", "within", "in assets", "a folder of another"])
def test_foreign_files_are_no_damage_and_stay(run: Callable[..., RunConfig], place: str) -> None:
    checkpoints = run().run_directory / "checkpoints"
    newest = checkpoints / "iter_0000006"
    mine = {
        "beside": checkpoints / "iter_0000003.txt",
        "within": newest / "model.safetensors",
        "in assets": newest / "assets" / "notes.md",
        "a folder of another": newest / "hf" / "config.json",
    }[place]
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    found, notes = continued(run(strict_resume=True))
    assert found is not None and found.path == newest and not any("passed over" in note for note in notes)
    assert mine.read_text() == "mine" and file_entry(mine)["bytes"] == 4


def test_a_run_goes_on_from_the_sound_one_and_writes_the_other_again(
    run: Callable[..., RunConfig], trained: tuple[Path, Path]
) -> None:
    """To the same bytes, in a training; the strict one before it ends with exit code 2 and leaves all as it is."""
    directory = run().run_directory
    newest = directory / "checkpoints" / "iter_0000006"
    before = file_entry(newest / "__0_0.distcp")
    _flipped(newest / "__0_0.distcp", 0.5)
    spoiled = file_entry(newest / "__0_0.distcp")
    fields = {**SAMPLED, "train_iters": 6, "keep_last": 2, "resume": True}
    refused = training_runs.train(directory, trained[1], **fields, strict_resume=True)
    assert refused.returncode == 2 and "__0_0.distcp does not have the sha256" in refused.stderr
    assert "Traceback" not in refused.stderr and file_entry(newest / "__0_0.distcp") == spoiled
    done = training_runs.train(directory, trained[1], **fields)
    assert done.returncode == 0 and "passed over" in done.stdout, done.stderr
    assert file_entry(newest / "__0_0.distcp") == before
    assert file_entry(directory / "checkpoints" / "iter_0000006.damaged" / "__0_0.distcp") == spoiled
