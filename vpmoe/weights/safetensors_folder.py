"""HF's weight files: a folder of safetensors shards, read tensor by tensor and written tensor by tensor.

The format (https://github.com/huggingface/safetensors): eight bytes with the length of a JSON header, the header with
dtype, shape and byte range of every tensor, then the values. Shapes are known before values, so a shard is written
without ever being whole in memory.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from megatron_vpmoe.files import inside, json_bytes, read_json, write_atomically
from vpmoe.errors import WeightsError
from vpmoe.weights.tensors import LazyTensor, Weights, tensor_bytes, tensor_sha256

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SHARD_BYTES = 4 << 30
_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
_DTYPES = {name: dtype for dtype, name in _NAMES.items()}
_SHOWN = 500  # characters of names
_REMEDY = "fetch or export it again"


def weight_files(folder: Path, *, partial: bool = False) -> list[str]:
    """Names of the shards of an HF directory.

    Args:
        partial: shards of the index that are not there are left out, as long as there is one.

    Raises:
        WeightsError: there are none, or the index names a file that is not there.
    """
    if (folder / INDEX).is_file():
        weight_map = read_json(folder / INDEX, error=WeightsError, remedy=_REMEDY).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise WeightsError("weight_map is no table of file names", source=str(folder / INDEX), remedy=_REMEDY)
        names = sorted(set(weight_map.values()))
    else:
        names = [SINGLE]
    missing = [name for name in names if not os.path.isfile(inside(folder, name))]
    if missing and (not partial or missing == names):
        raise WeightsError(
            f"no weights: {', '.join(missing)[:_SHOWN]} not found",
            source=str(folder),
            remedy=f"put the model's {SINGLE}, or its shards and {INDEX}, there",
        )
    return [name for name in names if name not in missing]


def read_weights(folder: Path, *, partial: bool = False) -> dict[str, LazyTensor]:
    """Every tensor of an HF directory, none read yet.

    Args:
        partial: of the shards that are there.

    Raises:
        WeightsError: no weights there, a damaged file, or a dtype that no model here has.
    """
    weights: dict[str, LazyTensor] = {}
    for name in weight_files(folder, partial=partial):
        path = folder / name
        try:
            with safe_open(path, framework="pt") as shard:
                for key in shard.keys():  # noqa: SIM118 - safe_open is no mapping
                    piece = shard.get_slice(key)
                    if key in weights or piece.get_dtype() not in _DTYPES:
                        fault = "lies in two files" if key in weights else f"has dtype {piece.get_dtype()}"
                        raise WeightsError(f"{key} {fault}", source=str(path), remedy=_REMEDY)
                    shape, dtype = tuple(piece.get_shape()), _DTYPES[piece.get_dtype()]
                    weights[key] = LazyTensor(shape, dtype, functools.partial(_read, path, key)).finite(key, str(path))
        except (SafetensorError, OSError) as error:
            raise WeightsError(f"not a readable safetensors file: {error}", source=str(path), remedy=_REMEDY) from error
    return weights


def _read(path: Path, key: str) -> torch.Tensor:
    with safe_open(path, framework="pt") as shard:
        return shard.get_tensor(key)


def write_weights(
    folder: Path,
    weights: Weights,
    *,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[str, int], None] = lambda name, size: None,
) -> dict[str, str]:
    """Write every tensor, in the mapping's order; returns name -> ``tensor_sha256``.

    Args:
        folder: exists; not atomic by itself, so write into a temporary folder and rename that.
        weights: what to write.
        shard_bytes: a shard is closed before it grows beyond this.
        progress: told each tensor's name and bytes once it is written.
    """
    shards = _divide(weights, shard_bytes)
    total = sum(tensor.nbytes for tensor in weights.values())
    names = [SINGLE] if len(shards) == 1 else [_shard_name(n, len(shards)) for n in range(1, len(shards) + 1)]
    hashes: dict[str, str] = {}
    for name, shard in zip(names, shards, strict=True):
        hashes |= _write_shard(folder / name, shard, progress)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(folder / INDEX, json_bytes(index))
    return hashes


def _shard_name(number: int, count: int) -> str:
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def _divide(weights: Weights, shard_bytes: int) -> list[dict[str, LazyTensor]]:
    shards: list[dict[str, LazyTensor]] = [{}]
    filled = 0
    for name, tensor in weights.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    return shards


def _write_shard(path: Path, weights: Mapping[str, LazyTensor], progress: Callable[[str, int], None]) -> dict[str, str]:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in weights.items():
        end = offset + tensor.nbytes
        header[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashes = {}
    with path.open("wb") as stream:
        stream.write(len(text).to_bytes(8, "little") + text)
        for name, lazy in weights.items():
            tensor = lazy.read()
            stream.write(tensor_bytes(tensor))
            hashes[name] = tensor_sha256(tensor)
            progress(name, tensor.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
    return hashes
