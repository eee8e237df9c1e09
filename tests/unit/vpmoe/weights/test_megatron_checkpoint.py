"""Streamed checkpoints are the trainer's: it loads what is written here, and what it saves is read here."""

from __future__ import annotations

import functools
import json
import weakref
from pathlib import Path

import pytest
import torch

from megatron_vpmoe.errors import CheckpointError
from tests.tiny import tiny_config
from vpmoe.errors import WeightsError
from vpmoe.weights.geometry import config_of, conform, expected_shapes, geometry_of, load_model
from vpmoe.weights.megatron_checkpoint import read_weights, write_checkpoint
from vpmoe.weights.tensors import LazyTensor

SMALL = {"num_layers": 2, "num_experts": None}


def state_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}


@pytest.mark.slow
def test_the_trainer_loads_it_and_it_reads_the_trainer(single_process, tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    from megatron_vpmoe.model.builder import build_model
    from megatron_vpmoe.training import checkpoint

    cfg = tiny_config()
    torch.manual_seed(1)
    model = build_model(cfg)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    state = state_of(model)
    run_state = {"config": geometry_of(cfg)}
    path, hashes = write_checkpoint(tmp_path, {k: LazyTensor.of(v) for k, v in state.items()}, run_state)
    assert hashes.keys() == state.keys() == expected_shapes(cfg).keys()

    other = build_model(cfg)
    assert not all(torch.equal(value, state[name]) for name, value in state_of(other).items())
    checkpoint.load(checkpoint.open_checkpoint(tmp_path), other)
    assert all(torch.equal(value, state[name]) for name, value in state_of(other).items())

    saved = tmp_path / "by_megatron"
    saved.mkdir()
    dist_checkpointing.save({"model": model.sharded_state_dict(metadata=dict(checkpoint.METADATA))}, str(saved))
    (saved / "run_state.json").write_text(json.dumps(run_state))
    for directory in (path, saved):
        read = read_weights(directory)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[name].read(), value) for name, value in state.items())
    built = load_model(config_of(geometry_of(cfg), source="test"), read_weights(path), source="test")
    assert all(torch.equal(value, state[name]) for name, value in state_of(built).items())


def test_one_tensor_in_memory_at_a_time(tmp_path: Path) -> None:
    cfg = tiny_config(**SMALL)
    alive: set[int] = set()
    most = 0

    def make(shape: tuple[int, ...]) -> torch.Tensor:
        nonlocal most
        tensor = torch.zeros(shape)
        alive.add(id(tensor))
        weakref.finalize(tensor, alive.discard, id(tensor))
        most = max(most, len(alive))
        return tensor

    weights = {
        name: LazyTensor(shape, torch.float32, functools.partial(make, shape))
        for name, shape in expected_shapes(cfg).items()
    }
    assert len(weights) > 20
    write_checkpoint(tmp_path, weights, {"config": geometry_of(cfg)})
    assert most <= 2


def test_a_changed_file_and_another_geometry_are_seen(tmp_path: Path) -> None:
    from megatron_vpmoe.training.checkpoint import open_checkpoint

    cfg = tiny_config(**SMALL)
    weights = {name: LazyTensor.of(torch.zeros(shape)) for name, shape in expected_shapes(cfg).items()}
    path, _ = write_checkpoint(tmp_path, weights, {"config": geometry_of(cfg)})
    data = path / "__0_0.distcp"
    data.write_bytes(data.read_bytes()[:-1] + b"x")
    with pytest.raises(CheckpointError, match="sha256"):
        open_checkpoint(path)
    with pytest.raises(CheckpointError, match="not a readable torch_dist checkpoint"):
        read_weights(tmp_path)
    other = geometry_of(tiny_config(**{**SMALL, "num_layers": 3}))
    with pytest.raises(WeightsError, match=r"missing: decoder\.layers\.2"):
        write_checkpoint(tmp_path, weights, {"config": other})
    (path / "run_state.json").write_text(json.dumps({"config": other}))
    with pytest.raises(WeightsError, match=r"has no decoder\.layers\.2"):
        read_weights(path)


def test_what_the_model_keeps_in_fp32_stays_so() -> None:
    cfg = tiny_config()
    shapes = expected_shapes(cfg)
    weights = {name: LazyTensor.of(torch.zeros(shape)) for name, shape in shapes.items()}
    stored = conform(weights, cfg, torch.bfloat16, source="test")
    fp32 = {name.rsplit(".", 1)[1] for name, tensor in stored.items() if tensor.dtype == torch.float32}
    assert fp32 == {"sink", "grape_log_freq", "value_residual_scale", "expert_bias"}


def test_a_geometry_that_contradicts_itself() -> None:
    geometry = geometry_of(tiny_config())
    geometry["model"]["num_query_groups"] = 3
    with pytest.raises(WeightsError, match="cannot be shared out evenly"):
        config_of(geometry, source="test")
