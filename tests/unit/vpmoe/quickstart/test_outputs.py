"""Outputs are checked file by file: damage anywhere makes them None."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.fixtures_dataset import small_dataset
from vpmoe.cli import main
from vpmoe.quickstart import outputs
from vpmoe.quickstart.environment import describe, differing_packages
from vpmoe.quickstart.errors import QuickstartError


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("rows")
    assert main(["data", "synth-mini", "--output-dir", str(folder), "--rows", "50"]) == 0
    return folder


def test_rows(rows: Path, tmp_path: Path) -> None:
    good = outputs.rows_outputs(rows)
    assert good and outputs.rows_outputs(tmp_path) is None
    for number, name in enumerate(sorted(path.name for path in rows.iterdir())):
        folder = tmp_path / str(number)
        shutil.copytree(rows, folder)
        (folder / name).unlink()
        assert outputs.rows_outputs(folder) is None, name
    assert outputs.rows_outputs(rows) == good


def test_dataset(tmp_path: Path) -> None:
    root = small_dataset(tmp_path / "set")
    good = outputs.dataset_outputs(root)
    assert good is not None
    for path in [*root.rglob("*.bin"), *root.rglob("*.idx"), root / "token_pieces.txt"]:
        original = path.read_bytes()
        path.write_bytes(bytes([original[0] ^ 1]) + original[1:])
        assert outputs.dataset_outputs(root) is None, path
        path.write_bytes(original)
    assert outputs.dataset_outputs(root) == good
    manifest = root / "manifest.json"
    manifest.write_text(manifest.read_text()[:-1])
    assert outputs.dataset_outputs(root) is None


def test_training_takes_the_newest_complete_checkpoint(tmp_path: Path) -> None:
    assert outputs.training_outputs(tmp_path) is None
    for iteration in (5, 10):
        folder = tmp_path / "checkpoints" / f"iter_{iteration:07d}"
        folder.mkdir(parents=True)
        (folder / "run_state.json").write_text(json.dumps({"iteration": iteration}))
    assert outputs.training_outputs(tmp_path) is None
    (tmp_path / "checkpoints" / "iter_0000005" / "files.json").write_text("{}")
    made = outputs.training_outputs(tmp_path)
    assert made is not None and made["iteration"] == 5


def test_evaluation_is_report_and_picture(tmp_path: Path) -> None:
    report = tmp_path / "evaluation.json"
    report.write_text("{}")
    assert outputs.evaluation_outputs(report) is None
    report.with_suffix(".png").write_bytes(b"1")
    before = outputs.evaluation_outputs(report)
    report.with_suffix(".png").write_bytes(b"2")
    assert before is not None and before != outputs.evaluation_outputs(report)


def test_packages_against_the_lock(tmp_path: Path) -> None:
    numpy = describe()["packages"]["numpy"]
    lock = tmp_path / "lock.txt"
    lock.write_text(f"# pins\nnumpy=={numpy}\n--extra-index-url x\n")
    assert differing_packages(lock) == []
    lock.write_text("numpy==0.1\n")
    assert differing_packages(lock) == [f"numpy {numpy}, pinned 0.1"]
    lock.write_text("no-such-package-as-this==1\n")
    with pytest.raises(QuickstartError, match="not installed"):
        differing_packages(lock)
    with pytest.raises(QuickstartError, match="no lock file"):
        differing_packages(tmp_path / "absent")
