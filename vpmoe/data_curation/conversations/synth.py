"""SYNTH's rows: their columns, the files that hold them, and the conversation that a row is."""

from __future__ import annotations

from vpmoe.data_curation.conversations.store import StoredConversation
from vpmoe.data_curation.rows.files import Row
from vpmoe.data_curation.rows.source import RowSource, RowStream, resolve
from vpmoe.errors import RowError
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
# A folder is read in one format: beside the parquet of generated rows lie held-out questions as JSONL.
_FORMATS = ((".parquet",), (".jsonl", ".jsonl.zst"))


def resolve_synth(spelled: str, revision: str | None = None) -> RowSource:
    """As :func:`~vpmoe.data_curation.rows.source.resolve`, of parquet or else JSONL."""
    return resolve(spelled, revision, formats=_FORMATS)


def open_synth(source: RowSource, cursor: dict | None = None) -> RowStream:
    """The rows of a source with the columns that make a conversation, from ``cursor`` on."""
    return source.open(_NEEDED, cursor, optional=_OPTIONAL)


def to_conversation(row: Row, prompts: Prompts) -> StoredConversation:
    """One SYNTH row as a conversation.

    Raises:
        RowError: a field is missing, empty, not UTF-8, or holds NUL.
    """
    for name in _NEEDED:
        value = row.get(name)
        if isinstance(value, bytes):
            raise RowError("invalid_utf8", f"{name} is not UTF-8", source=repr(value[:80]))
        check_text(value, name)
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
