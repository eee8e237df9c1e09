"""What ``make`` may remove."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

YOURS = ("runs", "data", "models", "reports", "artifacts", "configs")
CACHES = (".pytest_cache", ".ruff_cache", ".hypothesis", "vpmoe/__pycache__")


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_clean_leaves_what_a_user_has(repository: Path, tmp_path: Path) -> None:
    """The recipe at work in a copy of the Makefile's folder: only caches go."""
    shutil.copy(repository / "Makefile", tmp_path)
    for name in (*YOURS, *CACHES):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "something").write_text("kept")
    subprocess.run(["make", "clean"], cwd=tmp_path, check=True, capture_output=True)
    assert [name for name in YOURS if not (tmp_path / name / "something").is_file()] == []
    assert [name for name in CACHES if (tmp_path / name).exists()] == []
