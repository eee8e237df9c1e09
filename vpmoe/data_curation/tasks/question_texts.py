"""Questions with short answers as plain text: what a model learns that knows no conversations, and is asked by.

Question: Sort the digits 4 1 3.
Answer: 1 3 4
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megatron_vpmoe.files import file_entry, json_bytes, sha256_of_file, write_atomically
from vpmoe.data_curation.rows.documents import TEXT_COLUMN, resolve
from vpmoe.data_curation.rows.stream import Row
from vpmoe.data_curation.tasks.synth_mini import POOL_NAME, TEST_NAME
from vpmoe.errors import DataError

ID_COLUMN = "synth_id"
TRAIN_TEXTS = "pool.jsonl"
TEST_TEXTS = "test.jsonl"
RECORD_NAME = "texts.json"
_COLUMNS = (ID_COLUMN, "query", "synthetic_answer")
_VERSION = 1


def prompt(query: str) -> str:
    """The text up to where the answer begins."""
    return f"Question: {query}\nAnswer:"


def document(query: str, answer: str) -> str:
    """The whole text."""
    return f"{prompt(query)} {answer}\n"


def answer_in(continuation: str) -> str:
    """The answer that a continuation of :func:`prompt` gives: its first line."""
    return continuation.split("\n", 1)[0].strip()


def write_texts(rows_dir: Path, output_dir: Path, *, overwrite: bool = False) -> bool:
    """Write the texts of a pool of rows and of its held-out questions; False if they were there already.

    ``pool.jsonl`` keeps the rows' ids, so that a builder told of them (``--id-field synth_id``) deals the texts to
    train and valid as it deals the rows.

    Args:
        rows_dir: rows as ``vpmoe data synth-mini`` writes them.
        output_dir: gets ``pool.jsonl``, ``test.jsonl`` and, last, ``texts.json``.
        overwrite: replace texts of other rows.

    Raises:
        DataError: no rows there, or ``output_dir`` holds texts of others.
    """
    sources = {TRAIN_TEXTS: rows_dir / POOL_NAME, TEST_TEXTS: rows_dir / TEST_NAME}
    for path in sources.values():
        if not path.is_file():
            raise DataError("there are no rows", source=str(path), remedy="make them: vpmoe data synth-mini")
    state = {"version": _VERSION, "rows": {path.name: sha256_of_file(path) for path in sources.values()}}
    record = output_dir / RECORD_NAME
    if record.is_file() and not overwrite:
        kept = json.loads(record.read_bytes())
        if {key: kept.get(key) for key in state} == state and all(
            (output_dir / name).is_file() and file_entry(output_dir / name) == entry
            for name, entry in kept["files"].items()
        ):
            return False
        raise DataError(
            "the folder holds texts of other rows", source=str(record), remedy="pass --overwrite to write them again"
        )
    record.unlink(missing_ok=True)
    for name, path in sources.items():
        lines = (json.dumps(text) + "\n" for text in _texts(path))
        write_atomically(output_dir / name, "".join(lines).encode())
    files = {name: file_entry(output_dir / name) for name in sources}
    write_atomically(record, json_bytes(state | {"files": files}))
    return True


def _texts(path: Path) -> Iterator[Row]:
    for _, row in resolve(str(path)).rows(_COLUMNS):
        yield {ID_COLUMN: row[ID_COLUMN], TEXT_COLUMN: document(row["query"], row["synthetic_answer"])}
