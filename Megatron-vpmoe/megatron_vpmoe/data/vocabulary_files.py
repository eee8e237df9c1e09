"""What says which vocabulary a dataset's ids belong to, as files: a checkpoint keeps them, an export needs no dataset.

Of a dataset in a vocabulary of this project: ``vocabulary.json`` (the manifest's words on it) and, of a compact one,
its map. Of a dataset in the vocabulary of a Hugging Face tokenizer: that one's own files, which lie in the dataset's
folder ``tokenizer/``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePosixPath

from megatron_vpmoe.data.manifest import Manifest

VOCABULARY = "vocabulary.json"
_TOLD = ("name", "rank_file_sha256", "vocab_size", "padded_vocab_size", "compact_map")
# Whatever else lies beside them (generation settings, a chat template) may differ between datasets of one vocabulary.
_DECIDING = (VOCABULARY, "tokenizer.json", "vocab.json", "merges.txt")


def vocabulary_files(manifest: Manifest) -> dict[str, bytes]:
    """Name -> content.

    Raises:
        TokenizerError: a file that the manifest names is missing or has another hash.
    """
    entry = manifest.tokenizer
    files = {PurePosixPath(file.path).name: manifest.read_vocabulary_file(file) for file in entry.files}
    if files:
        return files
    told = entry.model_dump(mode="json", include=set(_TOLD))
    files[VOCABULARY] = (json.dumps(told, indent=1, sort_keys=True) + "\n").encode()
    if entry.compact_map is not None:
        files[entry.compact_map.path] = manifest.read_vocabulary_file(entry.compact_map)
    return files


def name_a_vocabulary(files: Mapping[str, bytes]) -> bool:
    """Whether a checkpoint's files say what its ids mean; generation settings alone do not."""
    return any(name in files for name in _DECIDING)


def differing(files: Mapping[str, bytes], others: Mapping[str, bytes]) -> list[str]:
    """Names of the files that both have and that make them different vocabularies."""
    return [name for name in _DECIDING if name in files and name in others and files[name] != others[name]]
