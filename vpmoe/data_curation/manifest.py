"""Manifests: the last file written to a dataset, and the only thing that makes a folder of files a dataset."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field

from megatron_vpmoe.files import Tell, first_damage, write_record
from megatron_vpmoe.manifest import (
    FILE_NAME,
    Content,
    Count,
    Entry,
    Kind,
    Name,
    PromptsEntry,
    SplitEntry,
    checked,
    read_sealed,
)
from vpmoe.errors import DataError

CONVERSATIONS = "harmony_conversations"
KINDS: tuple[str, ...] = get_args(Kind)
"""Of token files."""
_MAKE = "finish what makes it: vpmoe data convert (conversations) or vpmoe data build (token files)"


class _SpanTokens(Entry):
    context: Count
    analysis: Count
    final: Count


class _Split(SplitEntry):
    span_tokens: _SpanTokens


class _Lengths(Entry):
    counts: list[Count]
    longest: Count


class _Histogram(Entry):
    bin_width: Annotated[int, Field(ge=1, lt=2**31)]
    train: _Lengths
    valid: _Lengths


class _Rejects(Entry):
    count: Count
    reasons: dict[str, Count]
    path: Name | None
    sha256: str | None = None


class _Documents(Entry):
    rows_read: Count


class _TokenFiles(Content):
    splits: Annotated[dict[Literal["train", "valid"], _Split], Field(min_length=2)]  # pyright: ignore[reportIncompatibleVariableOverride]
    input_manifest_sha256: str
    config: dict[str, Any]
    truncation: dict[str, Count]
    documents: _Documents
    rejects: _Rejects
    length_histogram: _Histogram


class _Shard(Entry):
    name: Name
    rows: Count
    row_groups: Count
    bytes: Count
    sha256: str


class _Conversations(Entry):
    rows: Count
    bytes: Count
    shards: list[_Shard]
    prompts: PromptsEntry
    rejects: _Rejects


def write_manifest(folder: Path, manifest: dict[str, Any]) -> Path:
    """Write ``manifest.json`` into ``folder``, atomically and with a hash of itself; call it last."""
    path = folder / FILE_NAME
    write_record(path, manifest)
    return path


def read_manifest(folder: Path, *kinds: str) -> dict[str, Any]:
    """The manifest in ``folder``, of one of ``kinds`` if any is given; every field that its readers use is there.

    Raises:
        DataError: there is none, it is not JSON, was edited, lacks a field, or is of another kind.
    """
    manifest = read_sealed(folder, _MAKE)
    kinds = kinds or (CONVERSATIONS, *KINDS)
    if manifest.get("kind") not in kinds:
        raise DataError(
            f"the manifest is of kind {manifest.get('kind')!r}, expected {' or '.join(kinds)}",
            source=f"{folder / FILE_NAME}: kind",
            remedy="pass the folder of the right step: vpmoe data convert makes conversations, vpmoe data build makes "
            "token files of them",
        )
    checked(_Conversations if manifest["kind"] == CONVERSATIONS else _TokenFiles, manifest, folder)
    return manifest


def check_files(folder: Path, files: dict[str, dict[str, Any]], *, remedy: str, tell: Tell | None = None) -> None:
    """Hold files against their manifest's entries; raises :class:`DataError` for the first that differs.

    Args:
        folder, files: as for :func:`~megatron_vpmoe.files.first_damage`.
        remedy: of the error.
        tell: told the bytes of each piece that is read.
    """
    if damage := first_damage(folder, files, check_hashes=True, tell=tell):
        raise DataError(damage, source=str(folder), remedy=remedy)
