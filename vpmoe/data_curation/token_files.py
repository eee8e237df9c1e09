"""The three Megatron IndexedDatasets of a split's shard: tokens, lossmask, span; one document a conversation.

Written with megatron.core's own builder; read here without it (and without torch), straight from the documented layout
of the index: ``MMIDIDX\\0\\0``, version u64, dtype code u8, sequence count u64, document count u64, lengths i32, byte
offsets i64, document boundaries i64.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vpmoe.errors import DataError

SIGNALS = {"tokens": np.int32, "lossmask": np.uint8, "span": np.uint8}
_DTYPE_OF_CODE = {1: np.uint8, 4: np.int32}
_HEADER = struct.Struct("<9sQBQQ")
_REMEDY = "rebuild the dataset with --overwrite"


def file_names(shard: str) -> list[str]:
    """Names of the six files of a shard."""
    return [f"{shard}_{signal}.{suffix}" for signal in SIGNALS for suffix in ("bin", "idx")]


class TripleWriter:
    """Writes aligned documents into ``<prefix>_{tokens,lossmask,span}.{bin,idx}``."""

    def __init__(self, prefix: Path) -> None:
        # Imported here: it brings torch and takes seconds, which reading commands should not wait for.
        from vpmoe.data_curation.indexed_builder import IndexedDatasetBuilder

        self._prefix = prefix
        self._builders: dict[str, Any] = {
            signal: IndexedDatasetBuilder(f"{prefix}_{signal}.bin", dtype=dtype) for signal, dtype in SIGNALS.items()
        }

    def add(
        self,
        tokens: NDArray[np.int32],
        lossmask: NDArray[np.uint8],
        span: NDArray[np.uint8],
        lengths: NDArray[np.int64],
    ) -> None:
        """Append documents that lie one behind the other in three aligned arrays.

        Args:
            tokens, lossmask, span: ``[sum of lengths]``, as they are stored.
            lengths: ``[documents]``, tokens of each.
        """
        for builder, values in zip(self._builders.values(), (tokens, lossmask, span), strict=True):
            first = len(builder.sequence_lengths)
            builder.add_document(values, lengths.tolist())
            # The builder takes its argument for one document of many sequences; each is a document of its own.
            builder.document_indices[-1:] = range(first + 1, first + len(lengths) + 1)

    def close(self) -> None:
        """Write the indices."""
        for signal, builder in self._builders.items():
            builder.finalize(f"{self._prefix}_{signal}.idx")


@dataclass(frozen=True, slots=True)
class Triple:
    """A shard as flat arrays, memory-mapped; document d is ``[bounds[d] : bounds[d+1]]`` of each.

    Attributes:
        bounds: int64 ``[documents + 1]``.
        tokens, lossmask, span: int32 / uint8 / uint8 ``[bounds[-1]]``.
    """

    bounds: NDArray[np.int64]
    tokens: NDArray[np.int32]
    lossmask: NDArray[np.uint8]
    span: NDArray[np.uint8]

    @property
    def documents(self) -> int:
        """Number of conversations."""
        return len(self.bounds) - 1


def read_triple(folder: Path, shard: str) -> Triple:
    """Open the triple of ``shard`` in ``folder``.

    Raises:
        DataError: a file is missing or damaged, or the three disagree on the documents' lengths.
    """
    bounds: NDArray[np.int64] | None = None
    values: dict[str, NDArray[Any]] = {}
    for signal, dtype in SIGNALS.items():
        lengths = _read_index(folder / f"{shard}_{signal}.idx", dtype)
        own = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        if bounds is None:
            bounds = own
        elif len(own) != len(bounds) or (own != bounds).any():
            place = "another number of documents"
            if len(own) == len(bounds):
                place = f"another length of document {int(np.flatnonzero(own != bounds)[0]) - 1}"
            raise DataError(f"{signal} and tokens disagree: {place}", source=str(folder / shard), remedy=_REMEDY)
        values[signal] = _read_values(folder / f"{shard}_{signal}.bin", dtype, int(own[-1]))
    assert bounds is not None
    return Triple(bounds, **values)


def _read_index(path: Path, dtype: type[np.integer]) -> NDArray[np.int32]:
    if not path.is_file():
        raise DataError("an index file is missing", source=str(path), remedy=_REMEDY)
    raw = path.read_bytes()
    if len(raw) < _HEADER.size:
        raise DataError(f"the index has only {len(raw)} bytes", source=str(path), remedy=_REMEDY)
    magic, version, code, sequences, documents = _HEADER.unpack_from(raw)
    if magic != b"MMIDIDX\x00\x00" or version != 1 or _DTYPE_OF_CODE.get(code) is not dtype:
        raise DataError(
            f"not an index of {dtype.__name__} (magic {magic!r}, version {version}, dtype code {code})",
            source=str(path),
            remedy=_REMEDY,
        )
    expected = _HEADER.size + sequences * (4 + 8) + documents * 8
    if len(raw) != expected:
        raise DataError(
            f"the index has {len(raw)} bytes, its header asks for {expected}", source=str(path), remedy=_REMEDY
        )
    lengths = np.frombuffer(raw, np.int32, sequences, _HEADER.size)
    offsets = np.frombuffer(raw, np.int64, sequences, _HEADER.size + 4 * sequences)
    boundaries = np.frombuffer(raw, np.int64, documents, _HEADER.size + 12 * sequences)
    packed = np.concatenate([[0], np.cumsum(lengths[:-1], dtype=np.int64)]) * np.dtype(dtype).itemsize
    if (sequences and (offsets != packed).any()) or not np.array_equal(boundaries, np.arange(sequences + 1)):
        raise DataError("the index does not describe one document a conversation", source=str(path), remedy=_REMEDY)
    return lengths


def _read_values(path: Path, dtype: type[np.integer], count: int) -> NDArray[Any]:
    if not path.is_file():
        raise DataError("a data file is missing", source=str(path), remedy=_REMEDY)
    size, expected = path.stat().st_size, count * np.dtype(dtype).itemsize
    if size != expected:
        raise DataError(f"the file has {size} bytes, its index asks for {expected}", source=str(path), remedy=_REMEDY)
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)
