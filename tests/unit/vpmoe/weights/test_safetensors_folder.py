"""HF's weight files: what is written is what the format's own library reads, in as many shards as asked."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vpmoe.errors import WeightsError
from vpmoe.weights.safetensors_folder import INDEX, SINGLE, read_weights, weight_files, write_weights
from vpmoe.weights.tensors import LazyTensor, check_geometry, tensor_sha256, weights_sha256

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(6).to(torch.bfloat16),
    "scalar": torch.tensor(2.5),
    "mask": torch.tensor([True, False]),
}


def lazy(tensors: dict[str, torch.Tensor]) -> dict[str, LazyTensor]:
    return {name: LazyTensor.of(tensor) for name, tensor in tensors.items()}


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50], ids=["one shard", "several"])
def test_written_is_what_the_library_reads(tmp_path: Path, shard_bytes: int) -> None:
    hashes = write_weights(tmp_path, lazy(TENSORS), shard_bytes=shard_bytes)
    files = weight_files(tmp_path)
    assert (len(files) > 1) == (tmp_path / INDEX).is_file() == (shard_bytes == 50)
    found = {name: tensor for file in files for name, tensor in load_file(tmp_path / file).items()}
    assert found.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    read = read_weights(tmp_path)
    assert {name: tensor_sha256(tensor.read()) for name, tensor in read.items()} == hashes
    assert weights_sha256(hashes) == weights_sha256(dict(reversed(hashes.items())))


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    alive: set[int] = set()
    most = 0

    def make() -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(1000)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    write_weights(tmp_path, {f"t{n}": LazyTensor((1000,), torch.float32, make) for n in range(8)})
    assert most <= 2


def test_damage_is_named(tmp_path: Path) -> None:
    with pytest.raises(WeightsError, match=r"model\.safetensors not found"):
        read_weights(tmp_path)
    (tmp_path / SINGLE).write_bytes(b"no weights at all")
    with pytest.raises(WeightsError, match="not a readable safetensors file"):
        read_weights(tmp_path)


def test_a_tensor_that_is_not_as_declared() -> None:
    with pytest.raises(WeightsError, match="declared as"):
        LazyTensor((2,), torch.float32, lambda: torch.zeros(3)).read()


def test_geometry_names_every_kind_of_fault() -> None:
    with pytest.raises(WeightsError) as caught:
        check_geometry(lazy(TENSORS), {"a": (4, 3), "b": (6,), "scalar": (), "c": (1,)}, source="here")
    text = str(caught.value)
    assert "missing: c" in text and "surplus: mask" in text and "a: [3, 4], the geometry says [4, 3]" in text
