"""Questions with short answers as plain text: what a model learns that knows no conversations, and is asked by.

Question: Sort the digits 4 1 3.
Answer: 1 3 4
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_line, sha256_of_file, write_atomically
from vpmoe import steps
from vpmoe.data_curation.rows.files import TEXT_COLUMN, Row
from vpmoe.data_curation.rows.source import resolve
from vpmoe.data_curation.tasks.synth_mini import POOL_NAME, TEST_NAME
from vpmoe.errors import DataError

ID_COLUMN = "synth_id"
TRAIN_TEXTS = "pool.jsonl"
TEST_TEXTS = "test.jsonl"
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


def write_texts(
    rows_dir: Path, output_dir: Path, *, overwrite: bool = False, say: Callable[[str], None] = lambda line: None
) -> dict[str, Any]:
    """Write the texts of a pool of rows and of its held-out questions, unless they are there; returns how many.

    ``pool.jsonl`` keeps the rows' ids, so that a builder told of them (``--id-field synth_id``) splits the texts into
    train and valid as it splits the rows.

    Args:
        rows_dir: rows as ``vpmoe data synth-mini`` writes them.
        output_dir: gets ``pool.jsonl`` and ``test.jsonl``.
        overwrite: replace texts of other rows.
        say: told a line about what is found and done.

    Raises:
        DataError: no rows there.
        NotOursError, BusyError: see :func:`vpmoe.steps.run`.
    """
    sources = {TRAIN_TEXTS: rows_dir / POOL_NAME, TEST_TEXTS: rows_dir / TEST_NAME}
    for path in sources.values():
        if not path.is_file():
            raise DataError("there are no rows", source=str(path), remedy="make them: vpmoe data synth-mini")

    def make(work: steps.Work) -> dict[str, Any]:
        counts = {}
        for name, path in sources.items():
            lines = [json_line(text) for text in _texts(path)]
            write_atomically(work.folder / name, "".join(lines).encode())
            counts[name] = len(lines)
        return {"texts": counts}

    decides = {"rows": {path.name: sha256_of_file(path) for path in sources.values()}}
    step = steps.Step("question_texts", _VERSION, output_dir, decides, inputs=(rows_dir,))
    return steps.run(step, make, overwrite=overwrite, check_hashes=True, say=say)["report"]["texts"]


def _texts(path: Path) -> Iterator[Row]:
    for _, row in resolve(str(path)).rows(_COLUMNS):
        yield {ID_COLUMN: row[ID_COLUMN], TEXT_COLUMN: document(row["query"], row["synthetic_answer"])}
