"""What a teacher said of a position, as bytes: its K likeliest ids, their log-probabilities, and that of the label.

One record a supervised position, all of one width, one behind the other; a document has them all or none. Two codings:

``exact``: int32 ids and fp32 log-probabilities, likeliest first; 8 K + 4 bytes.
``compact``: ids ascending as Elias and Fano have it (the low bits of each, then how many share their high bits, in
unary): 109 bytes of 64 ids of 201,088, losing nothing. Each log-probability in 10 bits, at -R (c / 1023)² with R of the
record in fp16, so that likely ids are the finest; then scaled to the mass of all K, which is kept in fp32, as the
label's is. 199 bytes at K = 64.

Shapes: N records, K ids of a record, L tokens of a document.
"""

from __future__ import annotations

from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from megatron_vpmoe.annotation import FILLING_LOG_P, NO_RECORD, Annotation, of_teacher
from megatron_vpmoe.errors import DataError

PART = "teacher"
"""Of a shard's file names."""
_LEVELS, _LEVEL_BITS = 1023, 10
_REMEDY = "copy the dataset again if it was copied, or score it again (vpmoe data score --overwrite)"
Records = tuple[NDArray[np.int32], NDArray[np.float32], NDArray[np.float32]]
"""Ids [N, K], likeliest first, NO_RECORD where a teacher gave fewer; log p of each [N, K]; log p of the label [N]."""


class TeacherRecords(BaseModel):
    """The declaration of a dataset's teacher records, in its manifest.

    Attributes:
        count: K.
        vocab_size: ids are below it.
        temperature: that the teacher's logits were divided by.
        coding: "exact" or "compact".
    """

    model_config = ConfigDict(strict=True, frozen=True)

    count: Annotated[int, Field(ge=1, le=2**18)]
    vocab_size: Annotated[int, Field(ge=1, le=2**24)]
    temperature: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    coding: Literal["exact", "compact"] = "compact"

    @property
    def annotations(self) -> tuple[Annotation, ...]:
        """What documents and batches have of it."""
        return of_teacher(self.count, self.temperature)

    @property
    def stored(self) -> Annotation:
        """What the files beside a shard have of it."""
        return Annotation(name=PART, dtype="uint8", per="record", width=self.width)

    @cached_property
    def width(self) -> int:
        """Bytes of a record."""
        return sum(self._widths) if self.coding == "compact" else 8 * self.count + 4

    @cached_property
    def _low_bits(self) -> int:
        return max(((self.vocab_size + self.count) // self.count).bit_length() - 1, 0)

    @cached_property
    def _high_length(self) -> int:
        return ((self.vocab_size + self.count - 1) >> self._low_bits) + self.count

    @cached_property
    def _widths(self) -> list[int]:
        """Bytes of low bits, high bits, levels, R, and the two log-probabilities."""
        bits = (self.count * self._low_bits, self._high_length, self.count * _LEVEL_BITS)
        return [*(-(-number // 8) for number in bits), 2, 8]

    def encode(self, records: Records) -> NDArray[np.uint8]:
        """Uint8 [N · width]."""
        ids, log_p, of_label = records
        if self.coding == "exact":
            parts = [ids.astype("<i4"), log_p.astype("<f4"), of_label.astype("<f4")[:, None]]
            return np.concatenate([np.ascontiguousarray(part).view(np.uint8) for part in parts], 1).ravel()
        filling = ids == NO_RECORD
        # What fills up has ids of its own behind the vocabulary's.
        ids = np.where(filling, self.vocab_size + np.arange(self.count), ids).astype(np.int64)
        captured = np.minimum(_log_sum(log_p, ~filling), 0.0)
        order = ids.argsort(1)
        ids, below = np.take_along_axis(ids, order, 1), np.take_along_axis(np.where(filling, 0, -log_p), order, 1)
        reach = below.max(1, initial=0).astype(np.float16)
        reach = np.where(reach < below.max(1, initial=0), np.nextafter(reach, np.float16(np.inf)), reach)
        share = below.clip(0) / np.maximum(reach.astype(np.float64), 1e-6)[:, None]
        high = np.zeros((len(ids), self._high_length), np.uint8)
        np.put_along_axis(high, (ids >> self._low_bits) + np.arange(self.count), 1, 1)
        parts = [
            _pack(ids & ((1 << self._low_bits) - 1), self._low_bits),
            np.packbits(high, axis=1),
            _pack(np.rint(np.sqrt(share) * _LEVELS).astype(np.int64), _LEVEL_BITS),
            reach.astype("<f2")[:, None].view(np.uint8),
            np.stack([captured, of_label], 1).astype("<f4").view(np.uint8),
        ]
        return np.concatenate(parts, 1).ravel()

    def decode(self, content: NDArray[np.uint8], source: str) -> Records:
        """What :meth:`encode` was given, likeliest first; short records are filled up to K with ids of no probability.

        Raises:
            DataError: they are no such records.
        """
        if len(content) % self.width:
            raise DataError(f"{len(content)} bytes are no records of {self.width}", source=source, remedy=_REMEDY)
        rows = np.asarray(content).reshape(-1, self.width)
        if self.coding == "exact":
            ids = np.ascontiguousarray(rows[:, : 4 * self.count]).view("<i4").astype(np.int32)
            values = np.ascontiguousarray(rows[:, 4 * self.count :]).view("<f4").astype(np.float32)
            log_p, of_label = values[:, :-1], values[:, -1]
        else:
            ids, log_p, of_label = self._expanded(rows, source)
        known = ids != NO_RECORD
        sound = np.isfinite(log_p[known]).all() and np.isfinite(of_label).all()
        if not sound or (ids[known] < 0).any() or (ids >= self.vocab_size).any():
            what = "a record holds a number that is not finite, or an id outside the vocabulary"
            raise DataError(what, source=source, remedy=_REMEDY)
        for row in np.flatnonzero(~known.all(1)):
            spare = np.setdiff1d(np.arange(min(2 * self.count, self.vocab_size)), ids[row])
            ids[row, ~known[row]] = spare[: int((~known[row]).sum())]
            log_p[row, ~known[row]] = FILLING_LOG_P
        return ids, log_p, of_label

    def _expanded(self, rows: NDArray[np.uint8], source: str) -> Records:
        low, high, levels, reach, values = np.split(rows, np.cumsum(self._widths)[:-1], axis=1)
        bits = np.unpackbits(high, axis=1, count=self._high_length)
        if (bits.sum(1, dtype=np.int64) != self.count).any():
            raise DataError(f"a record does not hold {self.count} ids", source=source, remedy=_REMEDY)
        upper = np.nonzero(bits)[1].reshape(-1, self.count) - np.arange(self.count)
        ids = (upper << self._low_bits) + _unpack(low, self.count, self._low_bits)
        share = _unpack(levels, self.count, _LEVEL_BITS) / _LEVELS
        log_p = -np.ascontiguousarray(reach).view("<f2").astype(np.float64) * share**2
        captured, of_label = np.ascontiguousarray(values).view("<f4").astype(np.float32).T
        known = ids < self.vocab_size
        log_p += (captured - _log_sum(log_p, known))[:, None]
        order = np.where(known, -log_p, np.inf).argsort(1, kind="stable")
        ids, log_p = np.take_along_axis(np.where(known, ids, NO_RECORD), order, 1), np.take_along_axis(log_p, order, 1)
        return ids.astype(np.int32), log_p.astype(np.float32), of_label

    def of_document(
        self, content: NDArray[np.uint8], loss_mask: NDArray[np.uint8], source: str
    ) -> dict[str, NDArray[Any]]:
        """The annotations of a document by name: [L, K], [L, K] and [L], as their declarations say.

        Args:
            content: its records, or nothing: it was not scored.
            loss_mask: [L], where it is not 0 there is a record.
            source: for messages.

        Raises:
            DataError: they are not the document's.
        """
        ids = np.full((len(loss_mask), self.count), NO_RECORD, np.int32)
        log_p, of_label = np.zeros(ids.shape, np.float32), np.zeros(len(loss_mask), np.float32)
        if len(content):
            places = np.flatnonzero(loss_mask)
            found = self.decode(content, source)
            if len(found[0]) != len(places):
                what = f"{len(found[0])} records of {len(places)} supervised positions"
                raise DataError(what, source=source, remedy=_REMEDY)
            ids[places], log_p[places], of_label[places] = found
        return dict(zip((one.name for one in self.annotations), (ids, log_p, of_label), strict=True))


def _log_sum(log_p: NDArray[Any], known: NDArray[np.bool_]) -> NDArray[np.float64]:
    """log Σ p over the known ids of each record; fp64 [N]."""
    with np.errstate(divide="ignore"):
        return np.log(np.where(known, np.exp(log_p.astype(np.float64)), 0.0).sum(1))


def _pack(values: NDArray[np.int64], bits: int) -> NDArray[np.uint8]:
    """The last ``bits`` bits of each, one behind the other."""
    each = np.unpackbits(np.ascontiguousarray(values, ">u4").view(np.uint8), axis=1)
    each = each.reshape(*values.shape, 32)[:, :, 32 - bits :]
    return np.packbits(each.reshape(len(values), values.shape[1] * bits), axis=1)


def _unpack(content: NDArray[np.uint8], count: int, bits: int) -> NDArray[np.int64]:
    each = np.zeros((len(content), count, 32), np.uint8)
    each[:, :, 32 - bits :] = np.unpackbits(content, axis=1, count=count * bits).reshape(len(content), count, bits)
    return np.packbits(each.reshape(len(content), count * 32), axis=1).view(">u4").astype(np.int64)
