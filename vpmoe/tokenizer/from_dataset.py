"""The tokenizer that a built dataset was made with, read back from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import read_json
from vpmoe.errors import DataError, TokenizerError
from vpmoe.tokenizer.compact import NAME as COMPACT_NAME
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.hf_directory import NAME as HF_NAME
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
    path = Path(dataset_dir) / "manifest.json"
    return vocabulary_of(_tokenizer_entry(path), path, rank_file=rank_file)


def vocabulary_of(entry: Mapping[str, Any], path: Path, *, rank_file: Path | None = None) -> Tokenizer:
    """The vocabulary that ``entry``, the tokenizer entry of a manifest in the file ``path``, describes.

    Args:
        entry: ``name``, ``rank_file_sha256``, ``padded_vocab_size``, ``compact_map`` (beside the file).
        path: the file, also for messages.
        rank_file: as for ``load_tokenizer``.

    Raises:
        TokenizerError: as for ``load_tokenizer``.
    """
    if entry["name"] == HF_NAME:
        folder = path.parent / TOKENIZER_FOLDER
        return HFDirectory(folder, entry["padded_vocab_size"], sha256=entry["rank_file_sha256"])
    full = load_o200k_harmony(rank_file)
    if full.rank_file_sha256 != entry["rank_file_sha256"]:
        raise TokenizerError(
            f"the ids are of rank file {entry['rank_file_sha256']}, here is {full.rank_file_sha256}",
            source=str(path),
            remedy="rebuild the dataset with this version",
        )
    if entry["name"] == FULL_NAME:
        return full
    if entry["name"] != COMPACT_NAME:
        raise TokenizerError(f"unknown tokenizer {entry['name']!r}", source=str(path), remedy="rebuild the dataset")
    compact_map = entry["compact_map"]
    if compact_map is None:
        raise TokenizerError("a compact vocabulary without a map", source=str(path), remedy="rebuild the dataset")
    return CompactVocabulary.load(
        full,
        path.parent / compact_map["path"],
        sha256=compact_map["sha256"],
        padded_vocab_size=entry["padded_vocab_size"],
    )


def _tokenizer_entry(path: Path) -> dict[str, Any]:
    remedy = "build the dataset (vpmoe data build); without a manifest there is no dataset"
    manifest = read_json(path, remedy=remedy)
    entry = manifest.get("tokenizer")
    wanted = {"name", "rank_file_sha256", "padded_vocab_size", "compact_map"}
    if not isinstance(entry, dict) or not wanted <= entry.keys():
        raise DataError(
            f"the manifest's tokenizer entry lacks one of {sorted(wanted)}",
            source=str(path) + ": tokenizer",
            remedy=remedy,
        )
    return entry
