"""Predicted steps: parts add up, FLOPs are the geometry's, more of a machine is never slower."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest

from megatron_vpmoe.config import RunConfig, forward_flops_per_token, load_config
from megatron_vpmoe.config.layer_geometry import mean_keys
from megatron_vpmoe.config.memory import memory_estimate
from megatron_vpmoe.config.orthogonal import orthogonal_matrices
from megatron_vpmoe.config.parameters import parameter_sizes
from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.planning import here, work
from megatron_vpmoe.planning.predict import SPLIT, predict
from megatron_vpmoe.planning.wire import Ranks, all_gather, all_reduce, all_to_all
from megatron_vpmoe.runtime.machines import Fleet, fleet, machines

H100 = fleet("8xH100")
FULL = ("vpmoe_stage1.yaml", "vpdense_80.yaml", "vpdense0_5_28.yaml", "qwen3_0_6b.yaml")


@pytest.fixture(params=FULL)
def cfg(request: pytest.FixtureRequest, repository: Path) -> RunConfig:
    return load_config(repository / "configs" / request.param, ["--nproc-per-node=8"], nodes=1)


def shape_of(cfg: RunConfig) -> work.Shape:
    tokens = cfg.training.micro_batch_size * cfg.data.seq_length
    return work.Shape(cfg, tokens, tokens, 2, False)


def test_parts_add_up(cfg: RunConfig) -> None:
    found = predict(cfg, H100)
    assert set(found.split) == set(SPLIT) and all(value >= 0 for value in found.split.values())
    assert sum(found.split.values()) == pytest.approx(found.step_seconds)
    assert sum(found.parts.values()) == pytest.approx(found.split["compute"] + found.split["memory"])
    assert 0 < found.mfu_pct < 100
    assert found.mfu_pct / 100 * found.peak * found.step_seconds == pytest.approx(found.model_flops)


def test_products_are_those_of_the_geometry(cfg: RunConfig) -> None:
    """But for scores, which a kernel computes tile by tile, and the output layer, whose gradients are made forward."""
    shape = shape_of(cfg)
    forward = backward = 0.0
    for number in range(1, cfg.model.num_layers + 1):
        passes = work.layer_passes(shape, number)
        forward += sum(piece.flops for piece in passes.forward if piece.kind != "attention")
        backward += sum(piece.flops for piece in passes.backward if piece.kind != "attention")
    bias = 2.0 * (cfg.moe.num_experts or 0) * cfg.model.hidden_size * cfg.model.add_bias_linear  # the experts' second
    sparse = sum(cfg.is_moe_layer(number) for number in range(1, cfg.model.num_layers + 1))
    loss = sum(piece.flops for piece in work.loss_passes(shape).forward) / 3
    without_scores = forward_flops_per_token(cfg, keys=lambda _: 0.0)
    assert (forward + loss) / shape.tokens - sparse * bias == pytest.approx(without_scores)
    router = 2.0 * sparse * (cfg.moe.num_experts or 0) * cfg.model.hidden_size * shape.tokens
    assert backward == pytest.approx(2 * forward + router)


def test_tiles_hold_at_least_the_keys_in_sight(cfg: RunConfig) -> None:
    sight = partial(mean_keys, cfg.data.seq_length)
    for number in (1, cfg.model.num_layers):
        window = None if cfg.is_global_layer(number) else cfg.model.window_size
        for on_cpu in (False, True):
            assert sight(window) <= work.seen_keys(cfg, number, on_cpu=on_cpu) <= cfg.data.seq_length


def test_matrices_are_the_parameters_that_normuon_has(cfg: RunConfig) -> None:
    layers = range(1, cfg.model.num_layers + 1)
    numbers = sum(r * c * count for shapes in orthogonal_matrices(cfg, layers) for (r, c), count in shapes.items())
    stored = sum(
        size
        for name, size in parameter_sizes(cfg).items()
        if name.startswith("decoder.layers")
        and name.endswith("weight")
        and not name.endswith(("norm.weight", "router.weight"))
    )
    assert numbers == stored
    frozen = cfg.training.model_copy(update={"train_only": ["output_layer.weight", "embedding.*"]})
    assert not any(orthogonal_matrices(cfg.model_copy(update={"training": frozen}), layers))


def test_state_space_layers_are_not_predicted(repository: Path) -> None:
    with pytest.raises(DeviceError, match="not predicted"):
        predict(load_config(repository / "configs" / "think" / "state_space.yaml"), H100)


@pytest.mark.parametrize("key", ["bf16_tflops", "memory_gb_s", "link_gb_s", "network_gb_s"])
def test_a_faster_machine_is_not_slower(key: str, cfg: RunConfig) -> None:
    slow = machines()["H100"]
    fast = slow.model_copy(update={key: 2 * getattr(slow, key)})
    times = [predict(cfg, Fleet(machine=machine, gpus=16)).step_seconds for machine in (slow, fast)]
    assert times[1] <= times[0]


def test_more_is_computed_again_for_less_memory(repository: Path) -> None:
    path = repository / "configs" / "vpmoe_stage1.yaml"
    ways = (
        ["--recompute-granularity=null"],
        ["--recompute-granularity=full", "--recompute-method=block", "--recompute-num-layers=40"],
        ["--recompute-granularity=full"],
    )
    runs = [load_config(path, flags) for flags in ways]
    work_of = [sum(predict(run, H100).split[key] for key in ("compute", "memory")) for run in runs]
    assert work_of == sorted(work_of)
    memory = [memory_estimate(run).total for run in runs]
    assert memory == sorted(memory, reverse=True)


def test_overlapped_and_compiled_steps_are_not_slower(repository: Path) -> None:
    path = repository / "configs" / "vpmoe_stage1.yaml"
    plain, overlapped, layers, whole = (
        predict(load_config(path, flags), H100).step_seconds
        for flags in (["--overlap-grad-reduce=false"], [], ["--compile=layers"], ["--compile=step"])
    )
    assert overlapped < plain and whole < layers < overlapped


def test_launches_are_hidden_by_work_alone(repository: Path) -> None:
    """A host that launches for nothing costs what the device's own gaps cost, a slow one all that the work leaves."""
    cfg, machine = load_config(repository / "configs" / "nano" / "stage1.yaml"), machines()["H100"]
    found = [
        predict(cfg, Fleet(machine=machine.model_copy(update={"launch_us": us}), gpus=2)) for us in (0.0, 10.0, 20.0)
    ]
    busy = found[0].split["compute"] + found[0].split["memory"]
    assert found[0].split["launches"] < found[1].split["launches"] < found[2].split["launches"]
    assert found[2].split["launches"] + busy == pytest.approx(2 * (found[1].split["launches"] + busy), rel=0.05)


def test_collectives_cost_what_crosses_the_slowest_wire() -> None:
    machine = machines()["H100"]
    assert all_reduce(machine, 0.0, Ranks(8, 8)) == all_gather(machine, 1e9, Ranks(1, 1)) == 0
    assert all_to_all(machine, 1e9, Ranks(1, 1)) == 0
    inside = all_gather(machine, 8e9, Ranks(8, 8))
    assert inside == pytest.approx(7e9 / machine.rate("link", 8e9))
    assert all_reduce(machine, 8e9, Ranks(8, 8)) == pytest.approx(2 * inside)
    assert all_gather(machine, 8e9, Ranks(64, 8)) > inside
    assert all_gather(machine, 8e9, Ranks(8, 1)) > all_gather(machine, 8e9, Ranks(8, 4)) > inside
    assert all_to_all(machine, 8e9, Ranks(64, 8)) > all_to_all(machine, 8e9, Ranks(8, 8))


def test_what_cannot_be_predicted_says_how_it_could(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    cfg = load_config(repository / "configs" / "nano" / "stage1.yaml")
    assert here.CALIBRATE in here.announcement(cfg, device_name="CPU")
    assert "machines.toml" in here.announcement(cfg, device_name="NVIDIA GeForce RTX 4090")
    assert "\n" not in here.announcement(cfg, device_name="CPU")
    assert here.comparison(here.predicted(cfg, device_name="CPU"), 1.0) is None
    found = here.predicted(cfg, device_name="NVIDIA H200")
    assert not isinstance(found, str)
    assert here.announcement(cfg, device_name="NVIDIA H200").startswith("predicted: ")
    assert "2.00 times" in (here.comparison(found, 2 * found.step_seconds) or "")
    assert here.comparison(found, None) is None
