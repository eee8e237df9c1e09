"""The settings file: the tracked one is good, a bad one names every problem at once."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpmoe.quickstart.plan import SETTINGS
from vpmoe.quickstart.settings import QuickstartError, read_settings


def test_every_problem_at_once(tmp_path: Path, repository: Path) -> None:
    text = (repository / SETTINGS).read_text()
    assert "max_new_tokens = " in text and 'run_name = "' in text
    path = tmp_path / "bad.toml"
    path.write_text(text.replace("max_new_tokens = ", "max_new_tokns = ").replace('run_name = "', "run_name = 5 #"))
    with pytest.raises(QuickstartError) as caught:
        read_settings(path)
    assert caught.value.source == str(path)
    for key in ("evaluation.max_new_tokns", "evaluation.max_new_tokens", "training.run_name"):
        assert key in caught.value.what


@pytest.mark.parametrize("content", [None, "rows = [", "rows = " + "[" * 9999], ids=["missing", "broken", "deep"])
def test_missing_or_no_toml(tmp_path: Path, content: str | None) -> None:
    path = tmp_path / "settings.toml"
    if content is not None:
        path.write_text(content)
    with pytest.raises(QuickstartError):
        read_settings(path)
