"""The tokenizer that a built dataset was made with, read back from its manifest."""

from __future__ import annotations

from pathlib import Path

from megatron_vpmoe.files import inside
from megatron_vpmoe.manifest import HF_TOKENIZER, VocabularyEntry, read_manifest
from vpmoe.errors import TokenizerError
from vpmoe.tokenizer.compact import NAME as COMPACT_NAME
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.hf_directory import HFDirectory
from vpmoe.tokenizer.interface import Tokenizer
from vpmoe.tokenizer.o200k_harmony import NAME as FULL_NAME
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

TOKENIZER_FOLDER = "tokenizer"
"""Where a dataset with a vocabulary from an HF directory carries that directory's files."""


def load_tokenizer(dataset_dir: Path | str, *, rank_file: Path | None = None) -> Tokenizer:
    """The vocabulary of the built dataset in ``dataset_dir``.

    Args:
        dataset_dir: folder with the ``manifest.json`` that the builder wrote.
        rank_file: a rank file to use instead of the usual places.

    Raises:
        DataError: no readable manifest there.
        TokenizerError: the rank file or the compact map is missing or is not the one the dataset was built with.
    """
    manifest = read_manifest(dataset_dir)
    return vocabulary_of(manifest.tokenizer, manifest.path, rank_file=rank_file)


def vocabulary_of(entry: VocabularyEntry, path: Path, *, rank_file: Path | None = None) -> Tokenizer:
    """The vocabulary that ``entry``, in the file ``path``, describes.

    Args:
        entry: of a manifest or a ``vocabulary.json``; a compact map lies beside the file.
        path: the file, also for messages.
        rank_file: as for ``load_tokenizer``.

    Raises:
        TokenizerError: as for ``load_tokenizer``.
    """
    if entry.name == HF_TOKENIZER:
        return HFDirectory(path.parent / TOKENIZER_FOLDER, entry.padded_vocab_size, sha256=entry.rank_file_sha256)
    full = load_o200k_harmony(rank_file)
    if full.rank_file_sha256 != entry.rank_file_sha256:
        raise TokenizerError(
            f"the ids are of rank file {entry.rank_file_sha256}, here is {full.rank_file_sha256}",
            source=str(path),
            remedy="rebuild the dataset with this version",
        )
    if entry.name == FULL_NAME:
        return full
    if entry.name != COMPACT_NAME:
        raise TokenizerError(f"unknown tokenizer {entry.name!r}", source=str(path), remedy="rebuild the dataset")
    if entry.compact_map is None:
        raise TokenizerError("a compact vocabulary without a map", source=str(path), remedy="rebuild the dataset")
    return CompactVocabulary.load(
        full,
        inside(path.parent, entry.compact_map.path),
        sha256=entry.compact_map.sha256,
        padded_vocab_size=entry.padded_vocab_size,
    )
