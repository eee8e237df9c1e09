"""What of the site is not written by hand: its first page, the reference of fields and of verbs, links out of docs/.

MkDocs calls the ``on_`` functions (mkdocs.yml, ``hooks``). Nothing that they make is kept in the repository.
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import typer
from griffe import Extension, Object
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page
from typer.cli import get_docs_for_click

from megatron_vpmoe.config.schema import FieldSpec, fields, section_types
from megatron_vpmoe.config.schema_section import Section
from megatron_vpmoe.launch.reference import facts
from vpmoe.cli import VERBS, command_of

_MADE = re.compile(r"^<!-- made by the site: (\w+) -->.*?^<!-- end -->$", re.M | re.S)
_LINK = re.compile(r"\[([^\]]+)\]\(([^)#\s:]+)(#[^)\s]*)?\)")
_CODE_OR = r"(`[^`]*`)|"


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """The README as the first page."""
    readme = Path(config.config_file_path).with_name("README.md").read_text()
    files.append(File.generated(config, "index.md", content=readme))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """A page with what is made for it, and with links that lead somewhere in the site."""
    made = _MADE.sub(lambda found: _PARTS[found[1]](), markdown)
    return as_site(made, page.file.src_uri, config.repo_url)


def as_site(markdown: str, page: str, repository: str | None) -> str:
    """A page whose links to files are the site's.

    A page of docs/ stays a link. What lies elsewhere is a link into ``repository``, and without one its path as code.

    Args:
        markdown: as it stands in the repository.
        page: its path in the site; index.md is README.md.
        repository: address of one that shows files at ``blob/HEAD/``.
    """
    folder = "" if page == "index.md" else posixpath.join("docs", posixpath.dirname(page))

    def link(found: re.Match[str]) -> str:
        text, target, anchor = found[1], posixpath.normpath(posixpath.join(folder, found[2])), found[3] or ""
        target = "docs/index.md" if target == "README.md" else target
        if target.startswith("docs/"):
            place = posixpath.relpath(target.removeprefix("docs/"), posixpath.dirname(page) or ".")
            return f"[{text}]({place}{anchor})"
        if repository:
            return f"[{text}]({repository.rstrip('/')}/blob/HEAD/{target}{anchor})"
        return text if target in text else f"{text} (`{target}`)"

    return _LINK.sub(link, markdown)


def field_reference() -> str:
    """Every section and field of a run's configuration, as ``vpmoe train --help`` has them."""
    lines = []
    for section, section_type in section_types().items():
        lines += [f"## {section}", "", _prose(section_type.__doc__ or ""), ""]
        for spec in (spec for spec in fields().values() if spec.section == section):
            lines += [f"### {spec.name}", "", f"`{spec.flag}`: {_facts(spec)}", "", _meaning(spec), ""]
            lines += [f"- `{entry.name}`: {_facts(entry)}. {_meaning(entry)}" for entry in _entries(spec)] + [""]
    return "\n".join(lines)


def _facts(spec: FieldSpec) -> str:
    return _prose("; ".join(facts(spec)))


def _meaning(spec: FieldSpec) -> str:
    return _prose(spec.info.description or "")


def _entries(spec: FieldSpec) -> list[FieldSpec]:
    """What an entry of a list of mappings holds."""

    def walk(annotation: Any) -> list[FieldSpec]:
        if isinstance(annotation, type) and issubclass(annotation, Section):
            return [FieldSpec("", name, info) for name, info in annotation.model_fields.items()]
        return next(filter(None, map(walk, get_args(annotation))), [])

    return walk(spec.info.annotation)


def _prose(text: str) -> str:
    """Plain text as Markdown; a field that it names (and that is no word of English) is a link to it."""
    escaped = re.sub(r"([\\`*<>\[\]#])", r"\\\1", " ".join(text.split()))
    known = fields()
    return re.sub(r"\w+_\w+", lambda found: f"[{found[0]}](#{found[0]})" if found[0] in known else found[0], escaped)


def command_reference() -> str:
    """Every verb with its arguments and options, as ``--help`` has them."""
    pages = []
    for verb in VERBS:
        command = command_of(verb)
        text = get_docs_for_click(
            obj=command, ctx=typer.Context(command, info_name=verb), indent=1, name=verb, call_prefix="vpmoe"
        )
        text = re.sub(r"^\*\*Commands\*\*:\n.*?\n(?=#)", "", text, flags=re.M | re.S)  # short forms of what follows
        text = text.replace("* `--help`: Show this message and exit.\n", "").replace("**Options**:\n\n\n", "")
        pages.append(re.sub(_CODE_OR + "<", lambda found: found[1] or "&lt;", text))
    return "\n".join(pages)


_PARTS: dict[str, Callable[[], str]] = {"fields": field_reference, "verbs": command_reference}
"""What a page asks for by ``<!-- made by the site: NAME -->``, up to ``<!-- end -->``."""


class Roles(Extension):
    """Sphinx's roles in docstrings (:func:`name`) as the code that they name."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Called for everything that has a docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r":\w+:`~?([^`]+)`", r"`\1`", obj.docstring.value)
