"""Checkpoint files are read as data, whatever they hold."""

from __future__ import annotations

import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_vpmoe.errors import CheckpointError, VpmoeError
from megatron_vpmoe.files import json_bytes, list_files
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.runtime import pulse
from megatron_vpmoe.training import checkpoint, torch_dist
from megatron_vpmoe.training.initial_weights import load_initial_weights
from tests.any_json import changed_json
from tests.conftest import fuzz_settings
from tests.tiny import tiny_config
from tests.written_part import write_part
from vpmoe.eval.open_model import open_model
from vpmoe.weights.geometry import expected_shapes
from vpmoe.weights.megatron_checkpoint import read_config, read_weights, write_checkpoint
from vpmoe.weights.tensors import LazyTensor

SMALL = {"num_layers": 2, "num_experts": None}


def small_checkpoint(folder: Path) -> Path:
    cfg = tiny_config(**SMALL)
    weights = {name: LazyTensor.of(torch.ones(shape)) for name, shape in expected_shapes(cfg).items()}
    return write_checkpoint(folder, weights, {"config": cfg.model_dump(mode="json")})[0]


def relist(path: Path) -> None:
    """Make the list of files agree with what a hostile hand has put there."""
    (path / "files.json").write_bytes(json_bytes(list_files(path, leave_out=["files.json"])))


class Touch:
    """Unpickled, it makes a file."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.file,)


def read_into_a_model(path: Path) -> None:
    checkpoint.load(checkpoint.open_checkpoint(path), build_model(tiny_config(**SMALL)))


def start_from(path: Path) -> None:
    cfg = tiny_config(**SMALL, load_weights=path)
    load_initial_weights(build_model(cfg), cfg)


def open_it(path: Path) -> None:
    with open_model(path):
        pass


@pytest.mark.parametrize("use", [read_into_a_model, start_from, read_weights, open_it])
@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_no_pickle_runs(single_process, tmp_path: Path, use: Callable[[Path], object], name: str) -> None:
    """Resuming, ``load_weights``, exports and whatever opens a model; ``common.pt`` only trainings read."""
    path, touched = small_checkpoint(tmp_path), tmp_path / "touched"
    content = pickle.dumps(Touch(touched))
    if name == "__0_0.distcp":  # at the offset where a tensor is looked for, in torch's own format
        stream = io.BytesIO()
        torch.save([Touch(touched), torch.zeros(10_000)], stream)  # no shorter than the largest tensor
        content = stream.getvalue()
        metadata = torch_dist.Reader(path).metadata
        for place in metadata.storage_data.values():
            place.offset, place.length = 0, len(content)
        (path / ".metadata").write_bytes(pickle.dumps(metadata))
    (path / name).write_bytes(content)
    relist(path)
    if name != "common.pt" or use in (read_into_a_model, start_from):
        with pytest.raises(VpmoeError, match=r"readable|cannot be read|no vocabulary"):
            used = use(path)
            for tensor in used.values() if isinstance(used, dict) else ():
                tensor.read()
    assert not touched.exists()


def test_each_piece_hashed_and_each_tensor_read_is_a_sign_of_life(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, single_process: None
) -> None:
    path, signs = small_checkpoint(tmp_path), list[str]()
    model = build_model(tiny_config(**SMALL))
    monkeypatch.setattr(pulse, "beat", lambda: signs.append("of life"))
    found = checkpoint.open_checkpoint(path)
    assert len(signs) == len(json.loads((path / "files.json").read_text()))  # each of one piece
    signs.clear()
    checkpoint.load(found, model)
    assert len(signs) == sum(len(keys) for keys in checkpoint.stored_tensors(model).values())


def test_a_stored_object_is_data_too(single_process, tmp_path: Path) -> None:
    """The random state of a training run is an object among the tensors."""
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    def rng(data: Any) -> dict[str, Any]:
        return {"rng": ShardedObject("rng", data, (1,), (0,), replica_id=0)}

    write_part(tmp_path, rng({"cpu": torch.ones(3, dtype=torch.uint8)}))
    assert torch_dist.read(tmp_path, rng(None))["rng"]["cpu"].tolist() == [1, 1, 1]
    other, touched = tmp_path / "other", tmp_path / "touched"
    other.mkdir()
    write_part(other, rng(Touch(touched)))
    with pytest.raises(CheckpointError, match="cannot be read"):
        torch_dist.read(other, rng(None))
    assert not touched.exists()


def elsewhere(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.relative_path = "../other/__0_0.distcp"


def beyond_the_end(metadata: Any) -> None:
    for place in metadata.storage_data.values():
        place.offset = 2**50


def huge(metadata: Any) -> None:
    """More than any machine has, which would be allocated before a byte is read."""
    key, entry = next(iter(metadata.state_dict_metadata.items()))
    offsets = entry.chunks[0].offsets
    entry.size = torch.Size([2**40, *[1] * (len(entry.size) - 1)])
    entry.chunks = [torch_dist.layout.ChunkStorageMetadata(offsets, entry.size)]
    assert torch_dist.layout.MetadataIndex(key, offsets) in metadata.storage_data


@pytest.mark.parametrize(
    ("change", "said"), [(elsewhere, r"\.\./other"), (beyond_the_end, "beyond the end"), (huge, "fewer bytes")]
)
def test_tensors_lie_in_the_checkpoint_s_own_files(
    single_process, tmp_path: Path, capfd: pytest.CaptureFixture[str], change: Callable[[Any], None], said: str
) -> None:
    path = small_checkpoint(tmp_path)
    metadata = torch_dist.Reader(path).metadata
    change(metadata)
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    relist(path)
    for use in (read_weights, read_into_a_model):
        with pytest.raises(CheckpointError, match=said):
            use(path)
    assert "Traceback" not in capfd.readouterr().err


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_checkpoint(tmp_path_factory.mktemp("fuzzed"))


@pytest.mark.parametrize("name", ["files.json", "run_state.json", "metadata.json"])
@fuzz_settings(30)
@given(data=st.data())
def test_json_of_any_shape_is_an_error_or_a_checkpoint(sound: Path, name: str, data: st.DataObject) -> None:
    original = {path: path.read_bytes() for path in (sound / name, sound / "files.json")}
    value = json.loads(original[sound / name])
    try:
        (sound / name).write_text(json.dumps(data.draw(changed_json(value))))
        if name != "files.json":
            relist(sound)
        found = checkpoint.open_checkpoint(sound)
        assert found.iteration == 0
        read_config(sound)
        checkpoint.Carried.of(found)
        read_weights(sound)
    except VpmoeError as error:
        assert str(sound) in str(error)
    finally:
        for path, content in original.items():
            path.write_bytes(content)


@fuzz_settings(60)
@given(data=st.data())
def test_metadata_of_any_bytes_is_an_error_or_the_tensors(sound: Path, data: st.DataObject) -> None:
    file = sound / ".metadata"
    original = file.read_bytes()
    content = bytearray(original)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(content) - 1))
        content[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        file.write_bytes(content)
        for key in torch_dist.Reader(sound).tensors():
            assert isinstance(key, str)
        read_weights(sound)
    except VpmoeError as error:
        assert str(sound) in str(error)
    finally:
        file.write_bytes(original)
