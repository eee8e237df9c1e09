"""README and docs tell the truth about what can be checked: links, rooms, and every vpmoe command that they show."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer

from vpmoe.cli import VERBS

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "data" / "README.md",
    ROOT / "Megatron-vpmoe" / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
# Measured results keep the commands of their day.
TAUGHT = [page for page in PAGES if page.name != "LOG.md"]
_FREE = {"train", "profile"}
"""Verbs whose flags are the fields of a configuration."""


def commands_of(page: Path) -> list[list[str]]:
    """The words of every ``vpmoe ...`` line in a page's code blocks; continued lines are one."""
    found = []
    for block in re.findall(r"```(?:\w+)?\n(.*?)```", page.read_text(), flags=re.S):
        for line in block.replace("\\\n", " ").splitlines():
            command = re.split(r"\s#|[|;]|&&|\s{3,}(?=\S)", line.strip().removeprefix("$ "))[0]
            if command.startswith("vpmoe "):
                found.append(shlex.split(command)[1:])
    return found


def called(verb: str) -> Any:
    """The click command of a verb; None where there is none."""
    if verb not in VERBS:
        return None
    module, variable = VERBS[verb][0].split(":")
    return typer.main.get_command(getattr(importlib.import_module(module), variable))


@pytest.mark.parametrize("page", TAUGHT, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_shown_is_one(page: Path) -> None:
    wrong = []
    for words in commands_of(page):
        command, rest = called(words[0]), words[1:]
        while command is not None and hasattr(command, "get_command") and rest and not rest[0].startswith("-"):
            command = command.get_command(None, rest.pop(0))
        if command is None:
            wrong.append(f"no such verb: vpmoe {shlex.join(words)}")
        elif words[0] not in _FREE:
            known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
            known |= {"--help", "-h", "--debug"}
            flags = [word.partition("=")[0] for word in rest if re.match(r"-+[a-z]", word)]
            wrong += [f"no flag {flag}: vpmoe {shlex.join(words)}" for flag in flags if flag not in known]
    assert not wrong, "\n".join(wrong)


def test_the_pages_show_commands() -> None:
    assert len(commands_of(README)) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.slow
def test_readme_is_short_and_names_every_room() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 200
    tree = text[text.index("## The tree") :]
    for package in (ROOT / "vpmoe", ROOT / "Megatron-vpmoe" / "megatron_vpmoe"):
        rooms = [path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith("__")]
        assert not [room for room in rooms if f"{room}/" not in tree]
    named = re.findall(r"(?<![\w/])([a-z_]+)/", tree.split("```")[1])
    folders = {path.name for path in ROOT.rglob("*") if path.is_dir() and ".venv" not in path.parts}
    assert not [name for name in named if name not in folders]
