"""SYNTH's rows: their columns, the files that hold them, and the conversation that a row is."""

from __future__ import annotations

from dataclasses import replace

from vpmoe.data_curation.conversations.store import StoredConversation
from vpmoe.data_curation.rows.files import Row
from vpmoe.data_curation.rows.source import RowSource, RowStream, resolve
from vpmoe.errors import DataError, RowError
from vpmoe.harmony.conversation import Message, check_text
from vpmoe.harmony.prompts import Prompts

COLUMNS = (
    "synth_id",
    "language",
    "exercise",
    "model",
    "constraints",
    "seed_license",
    "query_seed_url",
    "query",
    "synthetic_reasoning",
    "synthetic_answer",
)
_NEEDED = ("synth_id", "query", "synthetic_reasoning", "synthetic_answer")
_OPTIONAL = ("language",)
HELD_OUT_NAME = "test.jsonl"
"""Beside parquet, a file of this name holds questions that are not to be trained on."""


def resolve_synth(spelled: str, revision: str | None = None) -> RowSource:
    """As :func:`~vpmoe.data_curation.rows.source.resolve`, of parquet or JSONL.

    Raises:
        DataError: a folder holds both, and more JSONL than the held-out questions.
    """
    source = resolve(spelled, revision, suffixes=(".parquet", ".jsonl", ".jsonl.zst"))
    parquet = tuple(file for file in source.files if file[1].suffix == ".parquet")
    if not parquet:
        return source
    if others := [name for name, path in source.files if path.suffix != ".parquet" and path.name != HELD_OUT_NAME]:
        raise DataError(
            f"the folder holds parquet and JSONL: {parquet[0][0]}, {others[0]}",
            source=spelled,
            remedy=f"keep them in folders of their own; only {HELD_OUT_NAME}, taken to be held out, may lie beside",
        )
    return replace(source, files=parquet)


def open_synth(source: RowSource, cursor: dict | None = None) -> RowStream:
    """The rows of a source with the columns that make a conversation, from ``cursor`` on."""
    return source.open(_NEEDED, cursor, optional=_OPTIONAL)


def to_conversation(row: Row | RowError, prompts: Prompts) -> StoredConversation:
    """One SYNTH row as a conversation.

    Raises:
        RowError: it is no row; a field is missing, empty, not UTF-8, or holds NUL.
    """
    if isinstance(row, RowError):
        raise row
    for name in _NEEDED:
        check_text(row.get(name), name)
    language = row.get("language")
    if language is not None:
        check_text(language, "language")
    messages = (
        *prompts.messages(),
        Message("user", row["query"]),
        Message("assistant", row["synthetic_reasoning"], "analysis"),
        Message("assistant", row["synthetic_answer"], "final"),
    )
    return StoredConversation(row["synth_id"], language, messages)
