"""Reports: small JSON documents, written whole or not at all."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_bytes, read_json, write_atomically
from vpmoe.errors import DataError
from vpmoe.steps import check_replaceable


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write ``report`` to ``path``, atomically; its folder is made if absent; see :func:`check_reportable`.

    Args:
        path: of the report.
        report: with ``provenance``, from :func:`megatron_vpmoe.software.provenance`.
    """
    assert "provenance" in report, f"{path}: every report says where it comes from"
    write_atomically(path, json_bytes(report))


def markdown_table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Rows of cells as a Markdown table; what a cell holds cannot end it."""
    lines = [[cell.replace("|", "\\|") for cell in row] for row in (headings, ["---"] * len(headings), *rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def check_reportable(path: Path, kind: str) -> None:
    """Refuse a path where something else than a report of ``kind`` lies, or a picture or table of others beside it.

    Raises:
        NotOursError: names the file.
    """
    check_replaceable(path, f'"kind": "{kind}"')
    if not path.exists():  # what is beside a report is ours as it is
        for suffix in (".png", ".md"):
            check_replaceable(path.with_suffix(suffix))


def read_report(path: Path, kind: str) -> dict[str, Any]:
    """The report at ``path``.

    Raises:
        DataError: there is none, it is not JSON, or it is of another kind.
    """
    remedy = "write it again with the command that makes it (vpmoe eval --help)"
    report = read_json(path, remedy=remedy)
    found = report.get("kind")
    if found != kind:
        raise DataError(f"the report is of kind {found!r}, expected {kind!r}", source=str(path), remedy=remedy)
    return report
