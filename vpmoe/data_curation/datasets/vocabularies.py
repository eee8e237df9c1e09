"""The vocabulary of a dataset, laid into its folder; and vocabularies learned from texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.files import write_atomically
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.rows.source import RowSource
from vpmoe.errors import DataError
from vpmoe.steps import Step, Work, check_place, run
from vpmoe.tokenizer.bpe import save_bpe, train_bpe
from vpmoe.tokenizer.compact import MAP_NAME as COMPACT_MAP_NAME
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.from_dataset import TOKENIZER_FOLDER
from vpmoe.tokenizer.hf_directory import HFDirectory
from vpmoe.tokenizer.interface import Tokenizer
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, load_o200k_harmony

_VERSION = 1
_TEXTS_COUNTED_TOGETHER = 10_000


def place_vocabulary(folder: Path, options: BuildOptions) -> None:
    """Copy the files of the vocabulary that ``options`` name into ``folder``."""
    if options.tokenizer is not None:
        for file in HFDirectory(options.tokenizer).files:
            write_atomically(folder / TOKENIZER_FOLDER / file.name, file.read_bytes())
    if options.compact_map is not None:
        write_atomically(folder / COMPACT_MAP_NAME, options.compact_map.read_bytes())


def vocabulary_in(folder: Path, options: BuildOptions) -> Tokenizer:
    """The vocabulary whose files lie in ``folder``; raises :class:`TokenizerError` for one that cannot be trusted."""
    if options.tokenizer is not None:
        return HFDirectory(folder / TOKENIZER_FOLDER, options.padded_vocab_size)
    full = load_o200k_harmony(options.tokenizer_model)
    if options.compact_map is None and options.compact_vocab_size is None:
        return full
    return CompactVocabulary.load(full, folder / COMPACT_MAP_NAME, padded_vocab_size=options.padded_vocab_size)


def write_bpe(
    source: RowSource,
    folder: Path,
    *,
    vocab_size: int,
    text_field: str,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Train a BPE in Qwen's form on the texts and write it as the HF directory ``folder``, unless it is there.

    Raises:
        DataError: unreadable texts.
        NotOursError: something else lies in ``folder``, or a vocabulary of other texts and no ``overwrite``.
        TokenizerError: too small a vocabulary.
    """
    step = _step("bpe", source, folder, ("tokenizers",), vocab_size=vocab_size, text_field=text_field)

    def make(work: Work) -> dict[str, Any]:
        tokenizer = train_bpe(_texts(source, text_field), vocab_size)
        save_bpe(tokenizer, work.folder)
        return {"vocab_size": tokenizer.get_vocab_size()}

    run(step, make, overwrite=overwrite, say=say)


def write_compact_map(
    source: RowSource,
    folder: Path,
    *,
    size: int,
    text_field: str,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the map of the o200k ids that the texts use most as ``folder/compact_vocab.npy``, unless it is there.

    Args:
        source: the texts.
        folder: its map is what ``--compact-map`` takes.
        size: ids in all, byte and special tokens included.
        text_field: column of the texts.
        overwrite: replace another map.
        say: told a line about what is found, replaced and done.

    Raises:
        DataError: unreadable texts.
        NotOursError: something else lies in ``folder``, or a map of other texts and no ``overwrite``.
        TokenizerError: no rank file, or too small a size.
    """
    step = _step("compact_vocabulary", source, folder, ("tiktoken", "numpy"), size=size, text_field=text_field)

    def make(work: Work) -> dict[str, Any]:
        full = load_o200k_harmony()
        counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
        texts = _texts(source, text_field)
        while batch := list(islice(texts, _TEXTS_COUNTED_TOGETHER)):
            counts += np.bincount(np.concatenate([full.encode_ordinary(text) for text in batch]), minlength=VOCAB_SIZE)
        vocabulary = CompactVocabulary.from_counts(full, counts, max_size=size)
        vocabulary.save(work.folder / COMPACT_MAP_NAME)
        return {"vocab_size": vocabulary.vocab_size}

    run(step, make, overwrite=overwrite, say=say)


def _step(kind: str, source: RowSource, folder: Path, packages: tuple[str, ...], **options: object) -> Step:
    check_place(folder)
    decides = {"options": options, "source": source.identity()}
    return Step(kind, _VERSION, folder, decides, packages, () if source.path is None else (source.path,))


def _texts(source: RowSource, field: str) -> Iterator[str]:
    for place, row in source.rows((field,)):
        if not isinstance(row.get(field), str):
            raise DataError(f"the row has no text in {field!r}", source=place, remedy="name the column: --text-field")
        yield row[field]
