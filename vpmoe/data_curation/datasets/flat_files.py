"""Flat token files: the ids of plain text one after the other, as small training programs map them into memory.

    train.bin, val.bin   ids of the splits train and valid, little-endian, each document ended by <|endoftext|>
    meta.json            what the ids mean, and how many there are
    tokenizer/           of a dataset in the vocabulary of an HF directory: that vocabulary's files

An id takes 2 bytes (uint16), of a vocabulary with more than 65,536 ids 4 (uint32).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, ValidationError

from megatron_vpmoe.files import inside, json_bytes, naming, read_json, sync, write_atomically
from megatron_vpmoe.manifest import Content, Count, Entry, Ids, Name
from megatron_vpmoe.token_files import read_triple
from vpmoe.data_curation.datasets.text import KIND
from vpmoe.data_curation.manifest import check_files, read_manifest
from vpmoe.errors import DataError, TokenizerError
from vpmoe.progress import hashing
from vpmoe.steps import Step, Work, check_place, run
from vpmoe.tokenizer import Tokenizer, load_tokenizer
from vpmoe.tokenizer.from_dataset import TOKENIZER_FOLDER

META_NAME = "meta.json"
Split = Literal["train", "valid"]
FILES: dict[Split, str] = {"train": "train.bin", "valid": "val.bin"}
"""By the split of a dataset."""
_VERSION = 1
_SCANNED = 1 << 22
_REBUILD = "build the dataset again with --overwrite"
_REMEDY = "copy the folder again, or write it again: vpmoe data to-flat"
_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}


class FlatFile(Entry):
    """One of the token files."""

    name: Name
    documents: Count
    tokens: Count
    bytes: Count
    sha256: str


class Meta(Entry):
    """``meta.json``; ``vocabulary`` is :attr:`vpmoe.tokenizer.interface.Tokenizer.identity`."""

    schema_version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Ids
    eod_id: Count
    special_tokens: dict[str, Count]
    vocabulary: dict[str, str]
    seq_length: Annotated[int, Field(ge=1)]
    files: Annotated[dict[Split, FlatFile], Field(min_length=2)]

    def require_vocabulary(self, tokenizer: Tokenizer, source: str) -> None:
        """Refuse another vocabulary than the ids are of; raises :class:`TokenizerError`."""
        if self.vocabulary != tokenizer.identity:
            raise TokenizerError(
                f"the ids are of {self.vocabulary}, and this vocabulary is {tokenizer.identity}",
                source=f"{source} and {tokenizer.source}",
                remedy="name the vocabulary that they were made with: --tokenizer or --compact-map",
            )


def write_flat(
    dataset: Path, output: Path, *, overwrite: bool = False, say: Callable[[str], None] = lambda line: None
) -> Meta:
    """Write the documents of a dataset of plain text into the folder ``output``, unless they are there; a keyed step.

    A document that the dataset holds in pieces is whole again.

    Raises:
        DataError: the dataset is of another kind, or damaged; or the disk is full.
        NotOursError: something else lies in ``output``, or the files of another dataset and no ``overwrite``.
        TokenizerError: its vocabulary is missing or damaged.
    """
    manifest = read_manifest(dataset)
    if manifest["kind"] != KIND:
        raise DataError(
            f"the dataset is of kind {manifest['kind']}, whose loss mask flat files have no place for",
            source=str(dataset),
            remedy="name a dataset of plain text (vpmoe data build-text)",
        )
    tokenizer = load_tokenizer(dataset)
    dtype = "uint16" if tokenizer.vocab_size <= 1 << 16 else "uint32"
    check_place(output)
    decides = {"dataset": Content.model_validate(manifest).hash}
    step = Step("flat_tokens", _VERSION, output, decides, ("numpy",), (dataset,))

    def make(work: Work) -> dict[str, Any]:
        carried = [file["path"] for file in manifest["tokenizer"].get("files", ())]
        for name in carried:
            write_atomically(work.folder / name, inside(dataset, name).read_bytes())
        files = {split: _written(dataset, manifest, split, work.folder, dtype) for split in FILES}
        meta = {
            "schema_version": 1,
            "dtype": dtype,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "special_tokens": tokenizer.special_tokens,
            "vocabulary": tokenizer.identity,
            "seq_length": manifest["seq_length"],
            "files": files,
        }
        write_atomically(work.folder / META_NAME, json_bytes(meta))
        return {"documents": {split: entry["documents"] for split, entry in files.items()}}

    run(step, make, overwrite=overwrite, say=say)
    return read_meta(output)


def _written(dataset: Path, manifest: dict[str, Any], split: Split, folder: Path, dtype: str) -> dict[str, Any]:
    """The entry of a split's file, which is written a part of a shard at a time."""
    path, eod = folder / FILES[split], manifest["tokenizer"]["eod_id"]
    digest, tokens, documents, last = hashlib.sha256(), 0, 0, eod
    with naming(path), path.open("wb") as stream:
        for shard in manifest["splits"][split]["shards"]:
            check_files(dataset / split, shard["files"], remedy=_REBUILD)
            for part in read_triple(dataset / split, shard["name"]).parts():
                content = np.asarray(part.tokens).astype(_DTYPES[dtype]).data
                stream.write(content)
                digest.update(content)
                tokens, last = tokens + len(part.tokens), int(part.tokens[-1])
                documents += int((np.asarray(part.tokens) == eod).sum())
    if last != eod:
        raise DataError("the last document has no end", source=str(dataset / split), remedy=_REBUILD)
    sync(path)
    size = tokens * _DTYPES[dtype].itemsize
    return {"name": path.name, "documents": documents, "tokens": tokens, "bytes": size, "sha256": digest.hexdigest()}


def read_meta(folder: Path) -> Meta:
    """What ``meta.json`` says; raises :class:`DataError` where there is none, or it lacks something."""
    path = folder / META_NAME
    try:
        return Meta.model_validate(read_json(path, remedy=_REMEDY))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors())
        raise DataError(f"it does not describe flat files: {problems}", source=str(path), remedy=_REMEDY) from error


class Flat:
    """Flat files, opened: their hashes are found right, their documents are.

    Args:
        folder: holds ``meta.json`` and the files that it names.

    Attributes:
        meta: what it says.

    Raises:
        DataError: a file is missing, of another size or content, or not what ``meta.json`` says.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.meta = folder, read_meta(folder)
        entries = {entry.name: entry.model_dump(include={"bytes", "sha256"}) for entry in self.meta.files.values()}
        with hashing("hashing the input", sum(entry["bytes"] for entry in entries.values())) as tell:
            check_files(folder, entries, remedy=_REMEDY, tell=tell)

    @property
    def tokenizer(self) -> Path | None:
        """The folder of the vocabulary's files that came along; None where none did."""
        own = self.folder / TOKENIZER_FOLDER
        return own if own.is_dir() else None

    def documents(self, split: Split) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """The ids of a split, memory-mapped, and where each document ends: behind its <|endoftext|>.

        Memory: 8 bytes a document.

        Raises:
            DataError: an id is outside the vocabulary, or the counts are others.
        """
        entry, dtype = self.meta.files[split], _DTYPES[self.meta.dtype]
        path = inside(self.folder, entry.name)
        if entry.bytes != entry.tokens * dtype.itemsize:
            raise self._fault(path, f"{entry.bytes} bytes are not {entry.tokens} ids of {self.meta.dtype}")
        ids = np.memmap(path, dtype, mode="r") if entry.tokens else np.empty(0, dtype)
        ends = [np.empty(0, np.int64)]
        for begin in range(0, len(ids), _SCANNED):
            part = np.asarray(ids[begin : begin + _SCANNED])
            if int(part.max()) >= self.meta.vocab_size:
                at = begin + int(np.argmax(part >= self.meta.vocab_size))
                raise self._fault(path, f"id {int(ids[at])} at {at} is none of the {self.meta.vocab_size} ids")
            ends.append(np.flatnonzero(part == self.meta.eod_id) + begin + 1)
        found = np.concatenate(ends)
        if len(found) != entry.documents or (len(ids) and (not len(found) or found[-1] != len(ids))):
            what = f"{len(found)} ends of documents, {entry.documents} are told; or ids behind the last of them"
            raise self._fault(path, what)
        return ids, found

    def _fault(self, path: Path, what: str) -> DataError:
        return DataError(what, source=str(path), remedy=_REMEDY)
