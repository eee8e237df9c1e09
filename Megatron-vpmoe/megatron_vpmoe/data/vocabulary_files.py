"""What says which vocabulary a dataset's ids belong to, as files: a checkpoint keeps them, an export needs no dataset.

Of a dataset in a vocabulary of this project: ``vocabulary.json`` (the manifest's words on it) and, of a compact one,
its map. Of a dataset in the vocabulary of a Hugging Face tokenizer: that one's own files, which lie in the dataset's
folder ``tokenizer/``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from pydantic import ValidationError

from megatron_vpmoe.errors import TokenizerError
from megatron_vpmoe.manifest import HF_TOKENIZER, Manifest, VocabularyEntry

VOCABULARY = "vocabulary.json"
# Which of them decides the ids of a Hugging Face tokenizer: the first that is there. What else lies beside them
# (generation settings, a chat template) may differ between models of one vocabulary.
_DECIDING = ("tokenizer.json", "vocab.json")
NAMING = (VOCABULARY, *_DECIDING)
"""What is enough to tell a vocabulary from another."""


def vocabulary_files(manifest: Manifest) -> dict[str, bytes]:
    """Name, without any folder -> content.

    Raises:
        TokenizerError: a file that the manifest names is missing or has another hash.
    """
    entry = manifest.tokenizer
    files = {PurePosixPath(file.path).name: manifest.read_vocabulary_file(file) for file in entry.files}
    if files:
        return files
    told = VocabularyEntry.model_validate(entry.model_dump()).model_dump()
    if entry.compact_map is not None:
        told["compact_map"]["path"] = name = PurePosixPath(entry.compact_map.path).name
        files[name] = manifest.read_vocabulary_file(entry.compact_map)
    files[VOCABULARY] = (json.dumps(told, indent=1, sort_keys=True) + "\n").encode()
    return files


def read_vocabulary(path: Path) -> VocabularyEntry:
    """A ``vocabulary.json``; raises :class:`TokenizerError` for one that does not say what its ids mean."""
    return _parsed(path.read_bytes(), str(path))


def identity_of(files: Mapping[str, bytes], source: str) -> dict[str, str] | None:
    """Which vocabulary the files of a checkpoint or an HF directory are, to be compared with a dataset's.

    Args:
        files: name -> content.
        source: where they lie, for messages.

    Returns:
        as :meth:`VocabularyEntry.identity`; None if they do not say it.

    Raises:
        TokenizerError: a damaged ``vocabulary.json``.
    """
    if VOCABULARY in files:
        return _parsed(files[VOCABULARY], f"{source}: {VOCABULARY}").identity()
    deciding = next((name for name in _DECIDING if name in files), None)
    if deciding is None:
        return None
    digest = hashlib.sha256(files[deciding]).hexdigest()
    return {"name": HF_TOKENIZER, "rank_file_sha256": digest, "compact_map_sha256": ""}


def another_vocabulary(files: Mapping[str, bytes], manifest: Manifest, source: str) -> str | None:
    """How the vocabulary that the weights' files name differs from the dataset's; None where it does not.

    Args:
        files, source: see :func:`identity_of`; files that name none differ from nothing.
        manifest: of the dataset.
    """
    of_weights, of_dataset = identity_of(files, source), manifest.tokenizer.identity()
    differing = [key for key in of_dataset if of_weights is not None and of_weights[key] != of_dataset[key]]
    told = "; ".join(f"{key} {(of_weights or {})[key] or 'none'} and {of_dataset[key] or 'none'}" for key in differing)
    return f"the weights and the dataset {manifest.root} do not share a vocabulary: {told}" if told else None


def _parsed(content: bytes, source: str) -> VocabularyEntry:
    try:
        return VocabularyEntry.model_validate_json(content)
    except ValidationError as error:
        what = f"it does not say which vocabulary it is: {error.errors()[0]['msg']}"
        raise TokenizerError(what, source=source, remedy="restore it from where the weights came from") from error
