"""How busy each expert of each layer was, at every logged step: ``expert_loads.bin`` of a run with experts.

A line of JSON (``layers``: their numbers, ``experts`` of each), then records of one size: the step, int64, and a
float16 [L, E] with the load of each expert as a multiple of its layer's mean (1 everywhere is perfect balance, 0 a dead
expert), all little-endian. 80 layers of 256 experts take 41 kB a record. Records of one size can be read anywhere in
the file without what lies before, while it grows; what a killed process left of a last one is no record, nor is what
a lost disk left as zeros.

Shapes: T records, L layers with experts, E experts of a layer.
"""

from __future__ import annotations

import bisect
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.files import naming, sync, write_atomically

if TYPE_CHECKING:
    from torch import Tensor

FILE_NAME = "expert_loads.bin"
_LONGEST_HEADER = 1 << 16
_SMALLEST = 2.0**-24
"""Of float16: an expert that got anything is not read as dead."""


@dataclass(frozen=True)
class ExpertLoads:
    """What was read.

    Attributes:
        layers: numbers of the layers, from 1.
        steps: int64 [T].
        load_TLE: float16, multiples of the layer's mean load.
    """

    layers: list[int]
    steps: NDArray[np.int64]
    load_TLE: NDArray[np.float16]


class ExpertLoadFile:
    """Appends to the file of a run.

    Args:
        path: of the file; made if absent, with its folder.
        layers: numbers of the layers with experts.
        experts: of each layer.
        resume_step: last step whose record stays; later ones, which will be done again, are cut off.

    Raises:
        DataError: an existing file is not one of these layers and experts.
    """

    def __init__(self, path: Path, layers: Sequence[int], experts: int, *, resume_step: int = 0) -> None:
        if path.exists():
            described, start, record = _header(path)
            if described != ([*layers], experts):
                raise DataError(
                    f"loads of {described[1]} experts in the layers {described[0]}; the run has {experts} in {layers}",
                    source=str(path),
                    remedy="move the file away: it is of another model",
                )
            with path.open("rb") as stream:
                places = range(start, start + _count(path, start, record) * record.itemsize, record.itemsize)
                kept = bisect.bisect_right(places, resume_step, key=lambda place: _step_at(stream, place))
            os.truncate(path, start + kept * record.itemsize)
        else:
            write_atomically(path, json.dumps({"layers": [*layers], "experts": experts}).encode() + b"\n")
        self._path, self._record = path, _record(len(layers), experts)
        self._stream = path.open("ab")
        sync(path.parent)

    def write(self, step: int, load_LE: Tensor) -> None:
        """Append the loads of a step, any real dtype, on the host; whole numbers of tokens or shares of them."""
        load = load_LE.double().numpy()
        mean = load.mean(1, keepdims=True)
        multiple = np.divide(load, mean, out=np.zeros_like(load), where=mean > 0)
        record = np.zeros((), self._record)
        record["step"], record["load"] = step, np.where(load > 0, np.maximum(multiple, _SMALLEST), 0.0)
        with naming(self._path):
            self._stream.write(record.tobytes())
            self._stream.flush()

    def sync(self) -> None:
        """Have every record on disk."""
        sync(self._path)

    def close(self) -> None:
        """Close the file."""
        with naming(self._path):
            self._stream.close()


def read_expert_loads(path: Path, *, most: int | None = None) -> ExpertLoads:
    """The records of a file, also of one that is being written.

    Args:
        path: of the file.
        most: of more records than this, 2 or more, every n-th and the last are read; None: all.

    Raises:
        DataError: there is no such file, or it is no file of loads.
    """
    if not path.is_file():
        raise DataError("no loads of experts", source=str(path), remedy="name a run that trains experts")
    (layers, _), start, record = _header(path)
    count = _count(path, start, record)
    chosen = [*range(count)]
    if most is not None and count > most:
        chosen = [*range(0, count - 1, -(-count // (most - 1))), count - 1]
    # Read, not mapped: a run that is resumed cuts the file, and a mapping of what is gone ends the process.
    with naming(path), path.open("rb") as stream:
        pieces = [_read_at(stream, start + place * record.itemsize, record.itemsize) for place in chosen]
    whole = [piece for piece in pieces if len(piece) == record.itemsize]
    records = np.frombuffer(b"".join(whole), record)
    records = records[records["step"] > 0]
    return ExpertLoads(layers, records["step"].astype(np.int64), records["load"])


def _record(layers: int, experts: int) -> np.dtype:
    return np.dtype([("step", "<i8"), ("load", "<f2", (layers, experts))])


def _header(path: Path) -> tuple[tuple[list[int], int], int, np.dtype]:
    """Layers and experts, where the records begin, and what one is."""
    with naming(path), path.open("rb") as stream:
        line = stream.readline(_LONGEST_HEADER)
    try:
        header = json.loads(line)
        layers, experts = [int(number) for number in header["layers"]], int(header["experts"])
        if not line.endswith(b"\n") or not layers or experts < 1:
            raise ValueError
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        remedy = "move the file away: it was not written by a run"
        raise DataError("no file of experts' loads", source=str(path), remedy=remedy) from error
    return (layers, experts), len(line), _record(len(layers), experts)


def _count(path: Path, start: int, record: np.dtype) -> int:
    return (path.stat().st_size - start) // record.itemsize


def _read_at(stream: BinaryIO, place: int, size: int) -> bytes:
    stream.seek(place)
    return stream.read(size)


def _step_at(stream: BinaryIO, place: int) -> float:
    """Infinite where a lost disk has left zeros: only behind what a checkpoint counts on."""
    return int.from_bytes(_read_at(stream, place, 8), "little", signed=True) or math.inf
