"""README and docs tell the truth about what can be checked: links, rooms, commands, messages, and what a site makes."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path

import pytest

from megatron_vpmoe.config.schema import fields
from scripts.docs import hooks
from vpmoe.cli import VERBS, command_of

ROOT = Path(__file__).resolve().parents[2]
README = ROOT / "README.md"
PAGES = [
    README,
    ROOT / "data" / "README.md",
    ROOT / "Megatron-vpmoe" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
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


@pytest.mark.parametrize("page", TAUGHT, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_shown_is_one(page: Path) -> None:
    wrong = []
    for words in commands_of(page):
        command, rest = command_of(words[0]) if words[0] in VERBS else None, words[1:]
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
    assert len(commands_of(README)) >= 8
    assert sum(len(commands_of(page)) for page in TAUGHT) > 50


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    missing = [target for target in targets if "://" not in target and not (page.parent / target).exists()]
    assert not missing


def test_tests_that_pages_name_are_there() -> None:
    named = {name for page in TAUGHT for name in re.findall(r"\btest_\w+\.py\b", page.read_text())}
    assert len(named) > 50 and not named - {path.name for path in (ROOT / "tests").rglob("test_*.py")}


def test_readme_is_short_and_names_every_room() -> None:
    text = README.read_text()
    assert len(text.splitlines()) <= 108
    tree = text[text.index("## The tree") :]
    for package in (ROOT / "vpmoe", ROOT / "Megatron-vpmoe" / "megatron_vpmoe"):
        rooms = [path.name for path in package.iterdir() if path.is_dir() and not path.name.startswith("__")]
        assert not [room for room in rooms if f"{room}/" not in tree]
    rooms = re.findall(r"^ *\S+", tree.split("```")[1], flags=re.M)
    assert len(rooms) == len({*rooms}), "each is told once"
    named = re.findall(r"(?<![\w/])([a-z_]+)/", tree.split("```")[1])
    folders = set()
    for _, inside, _ in os.walk(ROOT):
        inside[:] = [name for name in inside if not name.startswith(".")]
        folders.update(inside)
    assert not [name for name in named if name not in folders]


def plain(markdown: str) -> str:
    """Without its escapes, and links as what they show."""
    return re.sub(r"\[(\w+)\]\(#\1\)", r"\1", markdown).replace("\\", "")


def test_the_site_has_every_field() -> None:
    made = plain(hooks.field_reference())
    told = dict(zip((found := re.split(r"^### (\w+)$", made, flags=re.M))[1::2], found[2::2], strict=True))
    assert list(told) == list(fields())
    for name, spec in fields().items():
        given = "required" if spec.info.is_required() else "default"
        for wanted in (f"`{spec.flag}`: ", " ".join((spec.info.description or "?").split()), given):
            assert wanted in told[name], (name, wanted)
        facts = told[name].split("; ")[0]
        assert not re.search(r"integer|number", facts) or re.search(r", [\d.e-]+ to [\d.,e+]+$", facts), name
    assert "an integer or null, 1 to 4,194,304; default 128; binds" in told["window_size"]
    assert "a number, 0 to 0.49; default" in told["dpo_label_smoothing"]
    assert "binds" in told["num_layers"]
    assert "binds" not in told["train_iters"]
    assert "`factor`: a number" in told["lr_multipliers"]  # what an entry of a list holds


def test_the_site_has_every_verb_and_option() -> None:
    made = plain(hooks.command_reference())
    left = [(verb, command_of(verb)) for verb in VERBS]
    for name, command in left:
        assert f"`vpmoe {name}`" in made
        left += [(f"{name} {part}", entry) for part, entry in getattr(command, "commands", {}).items()]
        options = [option for parameter in command.params for option in parameter.opts if option.startswith("--")]
        assert not [option for option in options if option not in made], name


@pytest.mark.parametrize(
    ("page", "written", "repository", "shown"),
    [
        ("upcycle.md", "[t](LOG.md#a)", None, "[t](LOG.md#a)"),
        ("api/data.md", "[t](../LOG.md)", None, "[t](../LOG.md)"),
        ("index.md", "[t](docs/api/data.md)", None, "[t](api/data.md)"),
        ("index.md", "![t](docs/images/a.png)", None, "![t](images/a.png)"),
        ("upcycle.md", "[the tree](../README.md#the-tree)", None, "[the tree](index.md#the-tree)"),
        ("upcycle.md", "[t](../data/README.md)", None, "t (`data/README.md`)"),
        ("upcycle.md", "[`data/README.md`](../data/README.md)", None, "`data/README.md`"),
        ("upcycle.md", "[t](../a.py#b)", "https://x.y/z/", "[t](https://x.y/z/blob/HEAD/a.py#b)"),
        ("upcycle.md", "[t](#here) [u](https://x.y)", None, "[t](#here) [u](https://x.y)"),
    ],
)
def test_links_of_the_site(page: str, written: str, repository: str | None, shown: str) -> None:
    assert hooks.as_site(written, page, repository) == shown


def test_messages_explained_are_messages() -> None:
    """The stable parts of each message that docs/errors.md explains stand together in a file of the packages."""
    files = [path for package in ("vpmoe", "Megatron-vpmoe") for path in (ROOT / package).rglob("*.py")]
    sources = [re.sub(r'"\s*\n\s*f?"', "", path.read_text()) for path in files]  # literals of several lines as one
    told = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "errors.md").read_text(), flags=re.M)
    assert len(told) >= 30
    parts = {message: [part for part in re.split(r"\s*…\s*", message) if part] for message in told}
    missing = [told for told, known in parts.items() if not any(all(p in text for p in known) for text in sources)]
    assert not missing
