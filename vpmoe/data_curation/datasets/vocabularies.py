"""Vocabularies learned from texts: a byte-level BPE of one's own, or the ids of o200k that the texts use."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np

from megatron_vpmoe.files import json_bytes, sha256_of_file, sha256_of_json, write_atomically
from vpmoe.data_curation.rows.source import RowSource
from vpmoe.errors import DataError
from vpmoe.tokenizer.bpe import save_bpe, train_bpe
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.hf_directory import FILE_NAME
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, load_o200k_harmony

_VERSION = 1
_TEXTS_COUNTED_TOGETHER = 10_000


def write_bpe(source: RowSource, folder: Path, *, vocab_size: int, text_field: str, overwrite: bool = False) -> bool:
    """Train a BPE in Qwen's form on the texts and write it as an HF directory; False if it was there already.

    Raises:
        DataError: unreadable texts, or another vocabulary in ``folder``.
        TokenizerError: too small a vocabulary.
    """
    state = _state(source, vocab_size=vocab_size, text_field=text_field)
    record = folder / "training.json"
    if _is_there(folder / FILE_NAME, record, state, overwrite):
        return False
    save_bpe(train_bpe(_texts(source, text_field), vocab_size), folder)
    _write_record(folder / FILE_NAME, record, state)
    return True


def write_compact_map(source: RowSource, path: Path, *, size: int, text_field: str, overwrite: bool = False) -> bool:
    """Write the map of the o200k ids that the texts use most; False if it was there already.

    Args:
        source: the texts.
        path: a ``.npy`` for ``--compact-map``.
        size: ids in all, byte and special tokens included.
        text_field: their column.
        overwrite: replace another map.

    Raises:
        DataError: unreadable texts, or another map at ``path``.
        TokenizerError: no rank file, or too small a size.
    """
    state = _state(source, size=size, text_field=text_field)
    record = path.with_suffix(".json")
    if _is_there(path, record, state, overwrite):
        return False
    full = load_o200k_harmony()
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    for texts in _batched(_texts(source, text_field), _TEXTS_COUNTED_TOGETHER):
        counts += np.bincount(np.concatenate(full.encode_ordinary_batch(texts)), minlength=VOCAB_SIZE)
    CompactVocabulary.from_counts(full, counts, max_size=size).save(path)
    _write_record(path, record, state)
    return True


def _texts(source: RowSource, field: str) -> Iterator[str]:
    for place, row in source.rows((field,)):
        if not isinstance(row.get(field), str):
            raise DataError(f"the row has no text in {field!r}", source=place, remedy="name the column: --text-field")
        yield row[field]


def _batched(texts: Iterable[str], size: int) -> Iterator[list[str]]:
    texts = iter(texts)
    while batch := list(islice(texts, size)):
        yield batch


def _state(source: RowSource, **options: object) -> dict[str, object]:
    return {"version": _VERSION, "source": sha256_of_json(source.as_manifest()), **options}


def _is_there(path: Path, record: Path, state: dict[str, object], overwrite: bool) -> bool:
    if overwrite or not path.is_file():
        return False
    if record.is_file() and record.read_bytes() == json_bytes({**state, "sha256": sha256_of_file(path)}):
        return True
    raise DataError(
        "here lies a vocabulary of other texts or options, or one that was not made here",
        source=str(path),
        remedy="pass --overwrite to replace it",
    )


def _write_record(path: Path, record: Path, state: dict[str, object]) -> None:
    write_atomically(record, json_bytes({**state, "sha256": sha256_of_file(path)}))
