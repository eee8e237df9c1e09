"""One shard on disk: three Megatron-Core IndexedDatasets (tokens, loss mask, span) of equal layout."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import ShardEntry

if TYPE_CHECKING:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

PARTS = {"tokens": np.int32, "lossmask": np.uint8, "span": np.uint8}
"""The parts of a shard and their dtypes on disk."""

REBUILD = "rebuild the dataset (--overwrite), or copy it again if it was copied"

_INDEX_HEADER = struct.Struct("<9sQBQQ")
"""Of an .idx file: magic, version, dtype code, sequences, document boundaries (one more than documents)."""


class Shard:
    """The three memory-mapped parts of one shard, found consistent with each other and with the manifest.

    Args:
        folder: of the split.
        entry: the manifest's; at least one row.

    Attributes:
        source: the shard's path without endings, for messages.
        lengths: int32 [rows]; tokens of each conversation.

    Raises:
        DataError: an index is damaged, or does not agree with its data, the other parts or the manifest.
    """

    def __init__(self, folder: Path, entry: ShardEntry) -> None:
        self.source = str(folder / entry.name)
        self._parts = {part: _open_part(folder, entry.name, part) for part in PARTS}
        self.lengths: NDArray[np.int32] = self._parts["tokens"].sequence_lengths
        for part in ("lossmask", "span"):
            _check_agreement(self.source, part, self.lengths, self._parts[part].sequence_lengths)
        found = (len(self.lengths), int(self.lengths.sum(dtype=np.int64)))
        if found != (entry.rows, entry.tokens):
            raise _damaged(
                f"the manifest counts {entry.rows} rows and {entry.tokens} tokens, the index {found[0]} and {found[1]}",
                f"{self.source}_tokens.idx",
            )
        shortest = int(self.lengths.argmin())
        if self.lengths[shortest] < 2:
            raise _damaged(
                f"conversation {shortest} has {self.lengths[shortest]} tokens; nothing can be predicted in it",
                f"{self.source}_tokens.idx",
            )

    def document(self, row: int) -> Document:
        """Conversation ``row`` of this shard, memory-mapped."""
        return Document(*(self._parts[part][row] for part in PARTS))  # pyright: ignore[reportArgumentType]

    def first_tokens(self, count: int) -> NDArray[np.int32]:
        """The first tokens of the shard, ``count`` of them or all."""
        available = int(self.lengths.sum(dtype=np.int64))
        return self._parts["tokens"].bin_reader.read(dtype=np.int32, count=min(count, available), offset=0)


def _damaged(what: str, source: Path | str) -> DataError:
    return DataError(what, source=str(source), remedy=REBUILD)


def check_files(folder: Path, shard: ShardEntry) -> None:
    """Refuse a shard whose files are not all there in the sizes that the manifest lists.

    Raises:
        DataError: one is missing, unlisted or of another size.
    """
    for part in PARTS:
        for ending in ("bin", "idx"):
            path = folder / f"{shard.name}_{part}.{ending}"
            listed = shard.files.get(path.name)
            if listed is None:
                raise _damaged(f"{path.name} is not in the manifest", folder.parent / "manifest.json")
            if not path.is_file():
                raise _damaged(f"{path.name} is missing", path)
            size = path.stat().st_size
            if size != listed.bytes:
                raise _damaged(f"{path.name} has {size} bytes, the manifest says {listed.bytes}", path)


def _open_part(folder: Path, name: str, part: str) -> IndexedDataset:
    # Imported here: loading megatron.core takes seconds and is only right after runtime.device.prepare().
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    prefix = folder / f"{name}_{part}"
    _check_index(Path(f"{prefix}.idx"))
    dataset = IndexedDataset(str(prefix), mmap=True)
    if dataset.index.dtype != PARTS[part]:
        raise _damaged(
            f"the index says {np.dtype(dataset.index.dtype).name}, {part} is stored as {np.dtype(PARTS[part]).name}",
            f"{prefix}.idx",
        )
    needed = int(dataset.sequence_lengths.sum(dtype=np.int64)) * np.dtype(PARTS[part]).itemsize
    present = Path(f"{prefix}.bin").stat().st_size
    if needed != present:
        raise _damaged(f"the index describes {needed} bytes, the file has {present}", f"{prefix}.bin")
    return dataset


def _check_index(path: Path) -> None:
    # Upstream meets a damaged index with a bare assertion, and with noise from its destructor.
    with path.open("rb") as stream:
        raw = stream.read(_INDEX_HEADER.size)
    if len(raw) < _INDEX_HEADER.size:
        raise _damaged(f"the index is cut off after {len(raw)} bytes", path)
    magic, version, _dtype, sequences, boundaries = _INDEX_HEADER.unpack(raw)
    if (magic, version) != (b"MMIDIDX\x00\x00", 1):
        raise _damaged("this is not an index of Megatron-Core", path)
    if boundaries != sequences + 1:
        raise _damaged(f"{sequences} sequences in {boundaries - 1} documents; one document is one sequence", path)
    expected = _INDEX_HEADER.size + sequences * (4 + 8) + boundaries * 8
    if path.stat().st_size != expected:
        raise _damaged(f"the index has {path.stat().st_size} bytes, its {sequences} sequences take {expected}", path)


def _check_agreement(source: str, part: str, tokens: NDArray[np.int32], sidecar: NDArray[np.int32]) -> None:
    if len(tokens) != len(sidecar):
        raise _damaged(f"{len(tokens)} token rows but {len(sidecar)} {part} rows", f"{source}_{part}.idx")
    differing = np.flatnonzero(tokens != sidecar)
    if differing.size:
        row = int(differing[0])
        raise _damaged(
            f"{differing.size} rows disagree in length; row {row} has {tokens[row]} tokens and {sidecar[row]} {part} "
            "entries",
            f"{source}_{part}.idx",
        )


def check_ids(tokens: NDArray[np.int32], vocab_size: int, source: str) -> None:
    """Refuse ids outside [0, vocab_size).

    Raises:
        DataError: names one.
    """
    if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        bad = int(tokens.max()) if int(tokens.max()) >= vocab_size else int(tokens.min())
        raise _damaged(f"token id {bad} is outside the vocabulary of {vocab_size} ids", source)
