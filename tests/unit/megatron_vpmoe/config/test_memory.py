"""The memory estimate moves the way memory does, and a run that does not fit is refused with a way out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from megatron_vpmoe.config import check_fit, fit_report, load_config, memory_estimate, parameter_count
from megatron_vpmoe.config.memory import describe_geometry
from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.generation.kv_cache import KVCache

GIB = 2**30


def test_states_by_hand(small: Path) -> None:
    cfg = load_config(small, ["--optimizer", "adam", "--nproc-per-node", "1"])
    total = parameter_count(cfg).total
    parts = memory_estimate(cfg).parts
    assert parts["parameters"] == 4 * total
    # Aligned in their buffers; state is counted with that.
    assert parts["gradients"] == pytest.approx(4 * total, rel=2e-3) and parts["gradients"] > 4 * total
    assert parts["optimizer state"] == 2 * parts["gradients"]
    half = memory_estimate(load_config(small, ["--optimizer", "adam", "--nproc-per-node", "1", "--bf16"])).parts
    assert (half["parameters"], half["optimizer state"]) == (2 * total, 3 * parts["gradients"])


def test_a_live_teacher_counts_with_its_own_geometry(small: Path) -> None:
    flags = ["--nproc-per-node", "1", "--objective", "topk_kd", "--teacher-weights", "x"]
    cfg, teacher = load_config(small, flags), load_config(small, [*flags, "--ffn-hidden-size", "1024"])
    alone, both = memory_estimate(cfg), memory_estimate(cfg, teacher=teacher)
    assert both.parts == {**alone.parts, "teacher": 4 * parameter_count(teacher).total}
    half = memory_estimate(load_config(small, [*flags, "--reference-bf16"]), teacher=teacher)
    assert half.parts["teacher"] == 2 * parameter_count(teacher).total
    served = [*flags[:-2], "--teacher-server", "http://a:1", "--served-model", "gpt-oss"]
    assert memory_estimate(load_config(small, served)).parts == alone.parts


TWO_TENSOR_RANKS = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "--optimizer", "adam")


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--recompute-granularity", "full"], "activations"),
        (["--recompute-granularity", "full", "--recompute-num-layers", "2"], "activations"),
        (["--recompute-granularity", "full", "--recompute-method", "block"], "activations"),
        (["--recompute-granularity", "selective"], "activations"),
        (["--recompute-granularity", "selective", "--recompute-modules", "[moe]"], "activations"),
        (["--recompute-granularity", "selective", "--recompute-modules", "[mlp, shared_experts]"], "activations"),
        (["--micro-batch-size", "4"], "activations"),
        (["--expert-model-parallel-size", "2"], "parameters"),
        (["--nproc-per-node", "4"], "optimizer state"),
        (["--normuon-momentum-dtype", "bfloat16"], "optimizer state"),
        (["--attention-backend", "auto", "--window-size", "16"], "activations"),
        ([*TWO_TENSOR_RANKS], "parameters"),
        ([*TWO_TENSOR_RANKS], "gradients"),
        ([*TWO_TENSOR_RANKS], "activations"),
    ],
)
def test_what_saves_memory_is_estimated_lower(small: Path, flags: list[str], part: str) -> None:
    before = memory_estimate(load_config(small), on_cpu=True).parts[part]
    assert memory_estimate(load_config(small, flags), on_cpu=True).parts[part] < before


def test_recomputing_more_is_estimated_lower(small: Path) -> None:
    def activations(*flags: str) -> int:
        return memory_estimate(load_config(small, list(flags)), on_cpu=True).parts["activations"]

    full = ("--recompute-granularity", "full")
    block = [activations(*full, "--recompute-method", "block", "--recompute-num-layers", str(n)) for n in (2, 4, 8)]
    assert activations() > block[0] > block[1] > block[2] == activations(*full)
    selective = ("--recompute-granularity", "selective", "--recompute-modules")
    assert activations(*selective, "[shared_experts]") > activations(*selective, "[moe]")
    assert activations(*selective, "[moe]") > activations(*selective, "[core_attn, mlp, moe]") > activations(*full)


def test_data_parallel_ranks_share_the_optimizer_state(small: Path) -> None:
    one, two = (memory_estimate(load_config(small, ["--nproc-per-node", n])).parts for n in ("1", "2"))
    assert two["optimizer state"] == pytest.approx(one["optimizer state"] / 2, rel=0.01)
    # Two expert-parallel ranks hold half of the experts each, and nobody to share those with.
    experts = memory_estimate(load_config(small, ["--nproc-per-node", "2", "--expert-model-parallel-size", "2"])).parts
    assert experts["optimizer state"] == pytest.approx(two["optimizer state"], rel=0.01)


def test_a_stage_holds_its_share(small: Path) -> None:
    """Two stages of 4 layers: the first keeps two micro-batches under way, so its activations do not shrink."""
    whole, half = (
        memory_estimate(load_config(small, ["--pipeline-model-parallel-size", str(n), "--nproc-per-node", "2"])).parts
        for n in (1, 2)
    )
    assert 0.4 * whole["parameters"] < half["parameters"] < 0.6 * whole["parameters"]
    # Two data-parallel ranks share the state of all layers; a stage has that of its layers to itself.
    assert 0.8 * whole["optimizer state"] < half["optimizer state"] < 1.2 * whole["optimizer state"]
    assert 0.9 * whole["activations"] < half["activations"] < 1.1 * whole["activations"]


def test_rollouts_take_what_their_cache_takes(small: Path) -> None:
    """Where it is more than a micro-batch holds; otherwise nothing more."""
    sampled = ["--objective", "grpo", "--rewards", '[{"function":"finished"}]', "--eval-interval", "null"]
    short = ["--seq-length", "128", "--rollout-max-new-tokens", "64"]
    assert not any("sampling" in part for part in memory_estimate(load_config(small, [*sampled, *short])).parts)
    long = ["--seq-length", "8192", "--recompute-granularity", "full", "--micro-batch-size", "1"]
    cfg = load_config(small, [*sampled, *long, "--attention-backend", "auto"])
    parts, m = memory_estimate(cfg).parts, cfg.model
    windows = {n: None if cfg.is_global_layer(n) else m.window_size for n in range(1, m.num_layers + 1)}
    shape = {"groups": m.num_query_groups, "head_dim": m.kv_channels}
    cache = KVCache(windows, rows=32, **shape, dtype=torch.float32, device=torch.device("meta"))
    cache.reserve(8192)
    logits = 32 * m.padded_vocab_size * 4
    held = sum(size for part, size in parts.items() if part in ("activations", "loss") or "sampling" in part)
    assert any("sampling" in part for part in parts) and held == cache.nbytes + logits
    beside = memory_estimate(
        cfg.model_copy(update={"rollouts": cfg.rollouts.model_copy(update={"rollout_staleness": 1})})
    )
    assert beside.parts["parameters"] == parts["parameters"]
    assert beside.parts["weights that sample"] == 4 * parameter_count(cfg).total
    assert beside.parts["sampling"] == cache.nbytes + logits


def test_normuon_keeps_one_moment(small: Path) -> None:
    adam, normuon = (memory_estimate(load_config(small, ["--optimizer", o])) for o in ("adam", "normuon"))
    assert normuon.parts["optimizer state"] < adam.parts["optimizer state"]


def test_processes_share_a_cpu_but_not_gpus(small: Path) -> None:
    cfg = load_config(small, ["--nproc-per-node", "2"])
    assert fit_report(cfg, GIB, "CPU").processes_per_device == 2
    assert fit_report(cfg, GIB, "NVIDIA", device_count=2).processes_per_device == 1


def test_stage1_is_refused_here_and_fits_eight_large_gpus(stage1: Path) -> None:
    cfg = load_config(stage1)
    assert fit_report(cfg, 80 * GIB, "NVIDIA", device_count=8).fits
    with pytest.raises(DeviceError) as caught:
        check_fit(cfg, fit_report(cfg, 16 * GIB, "CPU"), "configs/nano/stage1.yaml")
    message = str(caught.value)
    for word in ("6,022,", "optimizer state", "16.00 GiB free on CPU", "vpmoe train configs/nano/stage1.yaml"):
        assert word in message
    with pytest.raises(DeviceError, match="recompute_granularity"):
        check_fit(cfg, fit_report(cfg, 16 * GIB, "CPU"), None)


def test_nano_fits_a_small_machine(repository: Path) -> None:
    cfg = load_config(repository / "configs" / "nano" / "stage1.yaml")
    check_fit(cfg, fit_report(cfg, 6 * GIB, "CPU"), None)


def test_description_names_every_part(stage1: Path) -> None:
    text = describe_geometry(load_config(stage1))
    for part in [*parameter_count(load_config(stage1)).parts, "active without embeddings", "optimizer state"]:
        assert part in text


def test_a_dry_run_names_idle_fields(stage1: Path, small: Path) -> None:
    idle = describe_geometry(load_config(small)).partition("idle here")[2].split("\n")[1:]
    assert idle and all("layer_type" in line for line in idle)  # fields of other layers than a transformer's
    text = describe_geometry(load_config(stage1, ["--no-tpa"]))
    assert "tpa_rank, tpa_q_rank, tpa_factor_bias: tpa is false" in text


def test_a_bias_on_distance_in_local_layers_needs_the_dense_mask(small: Path) -> None:
    banded, dense = load_config(small), load_config(small, ["--local-position-embedding", "grape_a"])
    for_banded, for_dense = (memory_estimate(cfg, on_cpu=True).parts["activations"] for cfg in (banded, dense))
    assert for_dense > for_banded
