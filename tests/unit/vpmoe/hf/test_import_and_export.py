"""Import and export replace only what they made themselves, and hand on what goes with weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.tiny_qwen3 import write_qwen3
from tests.tiny_student import write_student
from vpmoe.cli import main
from vpmoe.hf.convert import export_checkpoint, import_directory, open_directory
from vpmoe.weights.megatron_checkpoint import read_state

SMALL: dict[str, Any] = {"num_hidden_layers": 1, "vocab_size": 64}
PROMPTS = {"system": 'You are "vp",\n  and it rains. {{ 1 }}', "developer": "# Instructions\n\nBe brief."}


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture
def qwen3(tmp_path: Path) -> Path:
    return write_qwen3(tmp_path / "hf_one", **SMALL)


def test_another_model_takes_the_place_of_an_import_only_when_asked(
    qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = write_qwen3(tmp_path / "hf_two", seed=1, **SMALL)
    target = tmp_path / "imported"
    assert main(["hf", "import", str(qwen3), str(target)]) == 0
    before = tree(target)
    assert main(["hf", "import", str(qwen3), str(target)]) == 0, "made and valid"
    assert main(["hf", "import", str(other), str(target)]) == 2
    said = capsys.readouterr().err
    assert "files.model.safetensors" in said and "--overwrite" in said
    assert tree(target) == before
    assert main(["hf", "import", str(other), str(target), "--overwrite"]) == 0
    assert tree(target) != before


@pytest.mark.slow
def test_an_import_into_a_run_leaves_its_checkpoints_and_tracker_alone(
    qwen3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    newest = checkpoints / "iter_0000100"
    write_student(checkpoints, num_layers=2).rename(newest)
    tracker = checkpoints / "latest_checkpointed_iteration.txt"
    tracker.write_text("100\n")
    before = tree(checkpoints)
    for words in ([], ["--overwrite"]):
        assert main(["hf", "import", str(qwen3), str(checkpoints), *words]) == 2
        assert "was not made as 'hf-import'" in capsys.readouterr().err
    assert tree(checkpoints) == before


@pytest.mark.slow
def test_an_export_replaces_exports_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = (write_student(tmp_path / name, num_layers=2, seed=seed) for seed, name in enumerate(("one", "two")))
    target = tmp_path / "hf"
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    for words in ([], ["--overwrite"]):
        assert main(["hf", "export", str(one), str(target), *words]) == 2
        assert "holds notes.txt" in capsys.readouterr().err
    assert (target / "notes.txt").read_text() == "mine"
    (target / "notes.txt").unlink()
    assert main(["hf", "export", str(one), str(target)]) == 0
    before = tree(target)
    assert main(["hf", "export", str(two), str(target)]) == 2
    assert "checkpoint.files" in capsys.readouterr().err and tree(target) == before
    assert main(["hf", "export", str(two), str(target), "--overwrite"]) == 0
    assert tree(target) != before
    partial = tmp_path / "other.partial"
    partial.mkdir()
    (partial / "notes.txt").write_text("mine")
    assert main(["hf", "export", str(one), str(tmp_path / "other")]) == 2
    assert (partial / "notes.txt").read_text() == "mine"


def test_the_export_of_a_run_says_when_it_is_of_an_older_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoints = tmp_path / "run" / "checkpoints"
    for iteration in (3, 6):
        write_student(tmp_path / f"made_{iteration}", iteration=iteration, num_layers=2)
        checkpoints.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"made_{iteration}" / "iter_0000000").rename(checkpoints / f"iter_{iteration:07d}")
    (checkpoints / "iter_0000006" / "common.pt").unlink()
    assert main(["hf", "export", str(tmp_path / "run"), str(tmp_path / "hf")]) == 0
    said = capsys.readouterr().err
    assert "common.pt is missing" in said and "iter_0000003 is used instead" in said


@pytest.mark.slow
@pytest.mark.parametrize("form", ["qwen3", "student"])
def test_prompts_travel_there_and_back(form: str, qwen3: Path, tmp_path: Path) -> None:
    if form == "qwen3":
        config = json.loads((qwen3 / "config.json").read_text())
        (qwen3 / "config.json").write_text(json.dumps({**config, "prompts": PROMPTS}))
        checkpoint = import_directory(open_directory(qwen3), tmp_path / "first").path
    else:
        checkpoint = write_student(tmp_path / "first", prompts=PROMPTS, num_layers=2)
    assert read_state(checkpoint)["prompts"] == PROMPTS
    exported = export_checkpoint(checkpoint, tmp_path / "exported").path
    assert json.loads((exported / "config.json").read_text())["prompts"] == PROMPTS
    again = read_state(import_directory(open_directory(exported), tmp_path / "again").path)
    assert again["prompts"] == PROMPTS and "prompts" not in again["hf_config"]
