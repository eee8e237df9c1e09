"""``manifest.json`` of a built dataset, typed: what the builder promises and every reader relies on.

It is a record with a hash of itself (:mod:`megatron_vpmoe.files`). One that was written before manifests had that is
read where the ``receipt.json`` beside it lists it with the hash that it has, and nowhere else.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.errors import DataError, TokenizerError
from megatron_vpmoe.files import RECEIPT, first_damage, inside, read_json, read_record, sha256_of_json, unsealed
from megatron_vpmoe.teacher_records import PART, TeacherRecords

FILE_NAME = "manifest.json"
SCHEMA_VERSION = 1
HF_TOKENIZER = "hf_tokenizer"
"""Name of a vocabulary that is a Hugging Face tokenizer's."""
VOCABULARY_REMEDY = "rebuild the dataset (--overwrite), or copy it again if it was copied"
BUILD_REMEDY = (
    "build it with `python scripts/datasets/build_synth_kd_v1.py --input-dir data/synth_harmony --output-dir {path}` "
    "(`make quickstart` does it for the embedded rows), or point --data-path to a built dataset"
)


def _of_a_file(name: str) -> str:
    try:
        inside(Path(FILE_NAME), name)
    except DataError as error:
        raise ValueError(error.what) from error
    return name


Name = Annotated[str, AfterValidator(_of_a_file)]
"""Of a file, from the manifest's folder or its split's on; it does not lead out of it."""
Count = Annotated[int, Field(ge=0, lt=2**53)]
MOST_IDS = 2**24
LONGEST = 2**24
"""Tokens of a document, at most."""
Ids = Annotated[int, Field(ge=1, le=MOST_IDS)]
"""A number of ids: tables of so many are made before anything else is looked at."""
Kind = Literal["harmony_kd", "healing_text", "harmony_sft", "harmony_preference"]
PREFERENCE = "harmony_preference"
PAIR = 2
"""Documents of a preference pair: chosen, then rejected."""


class Entry(BaseModel):
    """What a manifest says of something; further fields are left alone."""

    model_config = ConfigDict(strict=True, frozen=True)


class FileEntry(Entry):
    """One file, relative to the folder of its split."""

    bytes: Count
    sha256: str


class ShardEntry(Entry):
    """One shard of a split: three indexed datasets of equal layout."""

    name: Name
    rows: Count
    tokens: Count
    files: dict[Name, FileEntry]


class SplitEntry(Entry):
    """One split."""

    rows: Count
    tokens: Count
    shards: list[ShardEntry]


class HashedFile(Entry):
    """A file beside the manifest."""

    path: Name
    sha256: str


class VocabularyEntry(Entry):
    """Which vocabulary it is: in a dataset's manifest, and as ``vocabulary.json`` in checkpoints and exports.

    ``rank_file_sha256`` is the hash of the file that decides its ids, a Hugging Face tokenizer's ``tokenizer.json``.
    """

    name: str
    rank_file_sha256: str
    vocab_size: Ids
    padded_vocab_size: Ids
    compact_map: HashedFile | None = None

    def identity(self) -> dict[str, str]:
        """What must be equal for two datasets, or a dataset and a model, to mean the same by an id."""
        compact = self.compact_map.sha256 if self.compact_map else ""
        return {"name": self.name, "rank_file_sha256": self.rank_file_sha256, "compact_map_sha256": compact}


class TokenizerEntry(VocabularyEntry):
    """The vocabulary that the ids on disk belong to.

    ``files`` are those of a Hugging Face tokenizer, where it is one's: ``tokenizer/tokenizer.json`` and what lies
    beside it.
    """

    eod_id: Count
    special_tokens: dict[str, Count]
    pieces: HashedFile
    files: list[HashedFile] = []


class PromptsEntry(Entry):
    """What stands before the user's message in every conversation of a dataset; None leaves a message out."""

    system: str | None = None
    developer: str | None = None


class AnnotatedEntry(Entry):
    """Who made annotations; ``by`` tells a name and a hash of the weights, or of a server the name of the model."""

    names: list[str]
    by: dict[str, Any]
    dataset_sha256: str | None = None


class Content(Entry):
    """What decides what is read; its hash identifies a dataset."""

    schema_version: Literal[1]
    kind: Kind
    pairs: bool = False
    seq_length: Annotated[int, Field(ge=1, le=LONGEST)]
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    prompts: PromptsEntry | None = None
    annotations: list[Annotation] = []
    teacher: TeacherRecords | None = None
    annotated: list[AnnotatedEntry] = []

    @property
    def hash(self) -> str:
        """Without annotations that of a manifest from before there were any."""
        absent = {name for name in ("annotations", "teacher") if not getattr(self, name)}
        return sha256_of_json(self.model_dump(exclude={*absent, "annotated"}))

    @property
    def stored(self) -> tuple[Annotation, ...]:
        """What lies in files beside each shard."""
        return (*self.annotations, *([self.teacher.stored] if self.teacher else []))


_Form = TypeVar("_Form", bound=BaseModel)


@dataclass(frozen=True)
class Manifest:
    """A manifest that has been read.

    Attributes:
        root: the dataset's folder.
        kind: which builder made it.
        sha256: of all that is read of it, every file's hash among that, so it identifies the dataset; not of what tells
            where it comes from, such as the commit of the code that built it.
        seq_length: longest conversation that the builder let through, in tokens.
        tokenizer: the vocabulary.
        splits: by name, "train" and "valid".
        group_size: neighbouring documents that have to share a row: 2 for preference pairs, else 1.
        prompts: its system and developer messages; None for plain text.
        annotations: that every document carries.
        stored: those that lie in files.
        teacher: the records that the others are read of, if there are any.
        teacher_is: who made them, by key: ``name``, ``weights_sha256`` and the like.
        documents_sha256: of the dataset that had no annotations yet, whose documents these are; else its own.
    """

    root: Path
    kind: Kind
    sha256: str
    seq_length: int
    tokenizer: TokenizerEntry
    splits: dict[str, SplitEntry]
    group_size: int = 1
    prompts: PromptsEntry | None = None
    annotations: tuple[Annotation, ...] = ()
    stored: tuple[Annotation, ...] = ()
    teacher: TeacherRecords | None = None
    teacher_is: Mapping[str, Any] = field(default_factory=dict)
    documents_sha256: str = ""

    @property
    def path(self) -> Path:
        """The manifest file."""
        return self.root / FILE_NAME

    def read_vocabulary_file(self, file: HashedFile) -> bytes:
        """The content of a file that ``tokenizer`` names.

        Raises:
            TokenizerError: it is missing or has another hash.
        """
        path = inside(self.root, file.path)
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
        DataError: it is missing, not JSON, was edited, is of another schema version, or lacks a field.
    """
    root = Path(data_path)
    content = checked(Content, read_sealed(root, BUILD_REMEDY.format(path=root)), root)
    return Manifest(
        root,
        content.kind,
        content.hash,
        content.seq_length,
        content.tokenizer,
        content.splits,
        PAIR if content.pairs else 1,
        content.prompts,
        (*content.annotations, *(content.teacher.annotations if content.teacher else ())),
        content.stored,
        content.teacher,
        next((entry.by for entry in content.annotated if PART in entry.names), {}),
        next((entry.dataset_sha256 for entry in content.annotated if entry.dataset_sha256), content.hash),
    )


def read_sealed(folder: Path, remedy: str) -> dict[str, Any]:
    """The manifest in a folder as it was written: its hash was found right, its fields were not looked at.

    Raises:
        DataError: it is missing, not JSON, was edited, or of another schema version.
    """
    path = folder / FILE_NAME
    if not path.is_file():
        what = "there is no dataset here (no manifest.json)" if folder.is_dir() else "this folder does not exist"
        raise DataError(what, source=str(folder), remedy=remedy)
    manifest = read_json(path, remedy=remedy)
    if "sha256" in manifest:
        manifest = unsealed(manifest, path, remedy="make the dataset again, or restore the manifest from a copy")
    else:
        _hold_against_receipt(folder)
    version = manifest.get("schema_version")
    if version != SCHEMA_VERSION:
        raise DataError(
            f"the manifest has schema_version {version!r}, this reader knows {SCHEMA_VERSION}",
            source=f"{path}: schema_version",
            remedy="make it again with this version of the code (--overwrite)",
        )
    return manifest


def _hold_against_receipt(folder: Path) -> None:
    remedy = "restore manifest and receipt as they were made, or make the dataset again (--overwrite)"
    try:
        listed = read_record(folder / RECEIPT)["files"][FILE_NAME]["sha256"]
        fault = first_damage(folder, {FILE_NAME: {"sha256": listed}}, check_hashes=True)
    except (DataError, KeyError, TypeError) as error:
        fault = f"{RECEIPT} does not vouch for it ({error.what if isinstance(error, DataError) else 'no such entry'})"
    if fault:
        what = f"the manifest has no hash of itself, and {fault}"
        raise DataError(what, source=str(folder / FILE_NAME), remedy=remedy)


def checked(form: type[_Form], manifest: dict[str, Any], folder: Path) -> _Form:
    """A manifest that was read, as ``form``.

    Raises:
        DataError: it lacks a field, or one is of a wrong kind.
    """
    path = folder / FILE_NAME
    try:
        return form.model_validate(manifest)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        what = f"the manifest is incomplete: {problems}"
        raise DataError(what, source=str(path), remedy="make the dataset again (--overwrite)") from error
