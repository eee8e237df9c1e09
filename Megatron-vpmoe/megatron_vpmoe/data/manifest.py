"""``manifest.json`` of a built dataset: what the reader relies on, typed. No manifest, no dataset."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from megatron_vpmoe.data.pairs import PAIR
from megatron_vpmoe.errors import DataError, TokenizerError
from megatron_vpmoe.files import read_json, sha256_of_json

SCHEMA_VERSION = 1
VOCABULARY_REMEDY = "rebuild the dataset (--overwrite), or copy it again if it was copied"
BUILD_REMEDY = (
    "build it with `python scripts/datasets/build_synth_kd_v1.py --input-dir data/synth_harmony --output-dir {path}` "
    "(`make quickstart` does it for the embedded rows), or point --data-path to a built dataset"
)


class _Entry(BaseModel):
    model_config = ConfigDict(strict=True, frozen=True)


class FileEntry(_Entry):
    """One file, relative to the folder of its split."""

    bytes: int
    sha256: str


class ShardEntry(_Entry):
    """One shard of a split: three indexed datasets of equal layout."""

    name: str
    rows: int
    tokens: int
    files: dict[str, FileEntry]


class SplitEntry(_Entry):
    """One split."""

    rows: int
    tokens: int
    shards: list[ShardEntry]


class HashedFile(_Entry):
    """A file beside the manifest."""

    path: str
    sha256: str


class TokenizerEntry(_Entry):
    """The vocabulary that the ids on disk belong to.

    ``files`` are those of a Hugging Face tokenizer, where it is one's: ``tokenizer/tokenizer.json`` and what lies
    beside it; ``rank_file_sha256`` is then the hash of the file that decides its ids.
    """

    name: str
    rank_file_sha256: str
    vocab_size: int
    padded_vocab_size: int
    eod_id: int
    special_tokens: dict[str, int]
    compact_map: HashedFile | None
    pieces: HashedFile
    files: list[HashedFile] = []

    def identity(self) -> dict[str, str]:
        """What must be equal for two datasets, or a dataset and a model, to mean the same by an id."""
        compact = self.compact_map.sha256 if self.compact_map else ""
        return {"name": self.name, "rank_file_sha256": self.rank_file_sha256, "compact_map_sha256": compact}


class PromptsEntry(_Entry):
    """What stands before the user's message in every conversation of a dataset; None leaves a message out."""

    system: str | None = None
    developer: str | None = None


class _Content(_Entry):
    schema_version: Literal[1]
    kind: Literal["harmony_kd", "healing_text", "harmony_sft", "harmony_preference"]
    pairs: bool = False
    seq_length: int
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    prompts: PromptsEntry | None = None


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been read.

    Attributes:
        root: the dataset's folder.
        sha256: of all that is read of it, every file's hash among that, so it identifies the dataset; not of what tells
            where it comes from, such as the commit of the code that built it.
        seq_length: longest conversation that the builder let through, in tokens.
        tokenizer: the vocabulary.
        splits: by name, "train" and "valid".
        group_size: neighbouring documents that have to share a row: 2 for preference pairs, else 1.
        prompts: its system and developer messages; None for plain text.
    """

    root: Path
    sha256: str
    seq_length: int
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    group_size: int = 1
    prompts: PromptsEntry | None = None

    @property
    def path(self) -> Path:
        """The manifest file."""
        return self.root / "manifest.json"

    def read_vocabulary_file(self, file: HashedFile) -> bytes:
        """The content of a file that ``tokenizer`` names.

        Raises:
            TokenizerError: it is missing or has another hash.
        """
        path = self.root / file.path
        try:
            content = path.read_bytes()
        except FileNotFoundError as error:
            raise TokenizerError(f"{file.path} is missing", source=str(path), remedy=VOCABULARY_REMEDY) from error
        digest = hashlib.sha256(content).hexdigest()
        if digest != file.sha256:
            what = f"{file.path} has sha256 {digest}, the manifest says {file.sha256}"
            raise TokenizerError(what, source=str(path), remedy=VOCABULARY_REMEDY)
        return content


def read_manifest(data_path: Path | str) -> Manifest:
    """Read the manifest of the dataset in the folder ``data_path``.

    Raises:
        DataError: it is missing, not JSON, of another schema version, or lacks a field.
    """
    root = Path(data_path)
    path = root / "manifest.json"
    remedy = BUILD_REMEDY.format(path=root)
    if not path.is_file():
        what = "there is no dataset here (no manifest.json)" if root.is_dir() else "this folder does not exist"
        raise DataError(what, source=str(root), remedy=remedy)
    parsed = read_json(path, remedy=remedy)
    version = parsed.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"the manifest has schema_version {version!r}, this reader knows {SCHEMA_VERSION}",
            source=f"{path}: schema_version",
            remedy="rebuild the dataset with this version of the code (--overwrite)",
        )
    try:
        content = _Content.model_validate(parsed)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise DataError(f"the manifest is incomplete: {problems}", source=str(path), remedy=remedy) from error
    sha256, group_size = sha256_of_json(content.model_dump()), PAIR if content.pairs else 1
    return Manifest(root, sha256, content.seq_length, content.tokenizer, content.splits, group_size, content.prompts)
