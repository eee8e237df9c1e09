"""The vocabulary of a dataset, laid into its folder; and vocabularies learned from texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.files import write_atomically
from vpmoe.data_curation.datasets.plan import SPLITS, BuildOptions
from vpmoe.data_curation.rows.source import RowSource
from vpmoe.errors import DataError
from vpmoe.steps import Step, Work, check_place, run
from vpmoe.tokenizer.bpe import SpecialTokens, save_bpe, train_bpe
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


@dataclass(frozen=True)
class Texts:
    """What a vocabulary is learned from.

    Attributes:
        source: the rows.
        text_field: column of the text.
        split_field: column that says the split, of which only train is read; None: all rows are.
        max_rows: read so many of the first of those; None: all.

    Raises:
        DataError: no row is to be read; on reading, a row without what the columns should hold.
    """

    source: RowSource
    text_field: str
    split_field: str | None = None
    max_rows: int | None = None

    def __post_init__(self) -> None:
        if self.max_rows is not None and self.max_rows < 1:
            raise DataError(f"{self.max_rows} rows", source="--max-rows", remedy="ask for at least 1")

    def options(self) -> dict[str, Any]:
        """Those that decide which texts they are, of a step's key."""
        limits = {"split_field": self.split_field, "max_rows": self.max_rows}
        return {"text_field": self.text_field, **{name: value for name, value in limits.items() if value is not None}}

    def __iter__(self) -> Iterator[str]:
        return islice(self._read(), self.max_rows)

    def _read(self) -> Iterator[str]:
        columns = tuple(filter(None, (self.text_field, self.split_field)))
        for place, row in self.source.rows(columns):
            if missing := [name for name in columns if not isinstance(row.get(name), str)]:
                raise DataError(
                    f"the row has no text in {missing[0]!r}",
                    source=place,
                    remedy="name the column: --text-field" if missing[0] == self.text_field else "mend the row",
                )
            if self.split_field is None or row[self.split_field] == SPLITS[0]:
                yield row[self.text_field]


def write_bpe(
    texts: Texts,
    folder: Path,
    *,
    vocab_size: int,
    special_tokens: SpecialTokens = "qwen",
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> int:
    """Train a BPE in Qwen's form on the texts and write it as the HF directory ``folder``, unless it is there.

    Returns:
        how many ids it has: ``vocab_size``, or fewer where the texts had no more pairs to merge.

    Raises:
        DataError: unreadable texts.
        NotOursError: something else lies in ``folder``, or a vocabulary of other texts and no ``overwrite``.
        TokenizerError: too small a vocabulary.
    """
    # As long as nothing else is asked for, the key is that of vocabularies from before there was a choice.
    asked = {} if special_tokens == "qwen" else {"special_tokens": special_tokens}
    step = _step("bpe", texts, folder, ("tokenizers",), vocab_size=vocab_size, **asked)

    def make(work: Work) -> dict[str, Any]:
        tokenizer = train_bpe(texts, vocab_size, special_tokens)
        save_bpe(tokenizer, work.folder)
        return {"vocab_size": tokenizer.get_vocab_size()}

    return run(step, make, overwrite=overwrite, say=say)["report"]["vocab_size"]


def write_compact_map(
    texts: Texts,
    folder: Path,
    *,
    size: int,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Write the map of the o200k ids that the texts use most as ``folder/compact_vocab.npy``, unless it is there.

    Args:
        texts: to count the ids of.
        folder: its map is what ``--compact-map`` takes.
        size: ids in all, byte and special tokens included.
        overwrite: replace another map.
        say: told a line about what is found, replaced and done.

    Raises:
        DataError: unreadable texts.
        NotOursError: something else lies in ``folder``, or a map of other texts and no ``overwrite``.
        TokenizerError: no rank file, or too small a size.
    """
    step = _step("compact_vocabulary", texts, folder, ("tiktoken", "numpy"), size=size)

    def make(work: Work) -> dict[str, Any]:
        full = load_o200k_harmony()
        counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
        left = iter(texts)
        while batch := list(islice(left, _TEXTS_COUNTED_TOGETHER)):
            counts += np.bincount(np.concatenate([full.encode_ordinary(text) for text in batch]), minlength=VOCAB_SIZE)
        vocabulary = CompactVocabulary.from_counts(full, counts, max_size=size)
        vocabulary.save(work.folder / COMPACT_MAP_NAME)
        return {"vocab_size": vocabulary.vocab_size}

    run(step, make, overwrite=overwrite, say=say)


def _step(kind: str, texts: Texts, folder: Path, packages: tuple[str, ...], **options: object) -> Step:
    check_place(folder)
    source = texts.source
    decides = {"options": {**options, **texts.options()}, "source": source.identity()}
    return Step(kind, _VERSION, folder, decides, packages, () if source.path is None else (source.path,))
