"""README's tree names every source file, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("Megatron-vpmoe/megatron_vpmoe", "vpmoe", "scripts", "ref", "configs")
ENDINGS = {".py", ".sh", ".yaml", ".toml"}


def test_the_tree_names_every_source_file() -> None:
    readme = (ROOT / "README.md").read_text()
    tree = readme[readme.index("## The tree") :].split("```")[1]
    listed = re.findall(r"^\s*(\S+\.(?:py|sh|yaml|toml))\b", tree, re.MULTILINE)
    named = {Path(name).name for name in listed} - {"__init__.py"}
    present = {
        path.name
        for folder in SOURCES
        for path in (ROOT / folder).rglob("*")
        if path.suffix in ENDINGS and path.name != "__init__.py"
    } | {"pyproject.toml"}
    folders = {"mini"}  # told in one line
    told = {path.name for folder in folders for path in (ROOT / "vpmoe/data_curation" / folder).glob("*.py")}
    assert present - named - told == set(), "files that README's tree leaves out"
    assert named - present == set(), "files that README's tree still names"
