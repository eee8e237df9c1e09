"""The full-scale step as a GPU would get it: where the host waits, and what is launched, sent and held."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_vpmoe.config import load_config, memory_estimate
from megatron_vpmoe.config.buffers import held_buckets
from megatron_vpmoe.planning.counts import Counts
from tests.counted import ROOT, SHORT, counted

FEW = ("--num-layers", "4")
TWO_RANKS = ("--tensor-model-parallel-size", "2", "--sequence-parallel", "true")
TWO_STAGES = ("--pipeline-model-parallel-size", "2")
RUNS: dict[str, tuple[tuple[str, ...], dict[str, int]]] = {
    f"{design} {name}": ((*overrides, *more), place)
    for design, config in {"dense": "vpdense_80.yaml", "moe": "vpmoe_stage1.yaml"}.items()
    for name, overrides, more, place in (
        ("on 8", (config, *SHORT), (), {}),
        ("on 64", (config, *FEW), (), {"world": 64, "steps": 1}),
        ("on 1,024", (config, *FEW), (), {"world": 1024, "steps": 1}),
        ("of two tensor-parallel ranks", (config, *FEW), TWO_RANKS, {}),
        ("of the first of two stages", (config, *FEW), TWO_STAGES, {"steps": 1}),
        ("of the last of two stages", (config, *FEW), TWO_STAGES, {"steps": 1, "rank": 7}),
    )
}
MADE_ONCE = ("model/attention/grape.py",)  # the slopes, in the first step of a process
DISPATCHER = ("transformer/moe/", "model/moe/")
"""Where upstream's exchange of tokens, and what stands on it, asks for numbers of rows."""

KINDS = ", ".join(f"{{layer_type: {kind}, num_layers: 1}}" for kind in ("transformer", "state_space", "denoiser"))
OTHER_LAYERS = {
    "a mixture of all": ("think/mixture.yaml", "--mixture-experts", f"[{KINDS}]"),
    "a denoiser": ("think/diffuser.yaml", "--num-layers", "1"),
}

of_runs = pytest.mark.parametrize("run", RUNS)


def step(run: str) -> Counts:
    arguments, place = RUNS[run]
    return counted(*arguments, **place)


def waits(counts: Counts, *passes: str) -> Counter[str]:
    """Times that the host waits in these passes, by "file:line"."""
    found = Counter[str]()
    for (of_pass, site), count in counts.syncs.items():
        if of_pass in passes:
            found[site] += count
    return found


@pytest.mark.slow
@of_runs
def test_the_host_runs_ahead(run: str) -> None:
    counts = step(run)
    found = waits(counts, "forward", "again", "backward", "other")
    assert not [site for site in found if not site.startswith(MADE_ONCE)]
    [(site, count)] = waits(counts, "optimizer").items()
    assert site.startswith("training/step.py") and count == 1  # for metrics and gradient norm together


@pytest.mark.slow
@pytest.mark.parametrize("run", OTHER_LAYERS)
def test_the_host_runs_ahead_of_other_layers(run: str) -> None:
    counts = counted(*OTHER_LAYERS[run])
    assert counts.total("forward").flops and not waits(counts, "forward", "backward", "other")
    [(site, count)] = waits(counts, "optimizer").items()
    assert site.startswith("training/step.py") and count == 1


@pytest.mark.slow
@of_runs
def test_every_part_is_counted(run: str) -> None:
    counts = step(run)
    for of_pass in ("forward", "again", "backward", "optimizer"):
        assert all(counts.total(of_pass))
    assert counts.total("again", "attention").flops == counts.total("forward", "attention").flops
    assert {"weights", "gradients", "optimizer state", "forward"} <= counts.peaks["backward"].keys()


@pytest.mark.slow
def test_a_layer_is_few_launches() -> None:
    dense, moe = step("dense on 8"), step("moe on 8")
    assert dense.layers["forward", "local dense"] <= 80 and dense.layers["forward", "global dense"] <= 80
    assert moe.layers["forward", "local moe"] <= 80 and moe.layers["forward", "global moe"] <= 80


@pytest.mark.slow
def test_an_update_is_few_launches() -> None:
    # About 50 a stack of matrices, 25 of them Polar Express, and 4 a piece of a parameter of experts.
    assert step("dense on 8").total("optimizer").launches <= 400
    assert step("moe on 8").total("optimizer").launches <= 400


@pytest.mark.slow
@pytest.mark.parametrize("run", [run for run in RUNS if "stages" not in run])  # of one micro-batch, not those under way
def test_memory_is_as_estimated(run: str) -> None:
    (config, *overrides), place = RUNS[run]
    estimate = memory_estimate(load_config(ROOT / "configs" / config, overrides), world=place.get("world"))
    outside = estimate.parts["process"] + estimate.parts["batches"]
    assert step(run).peak == pytest.approx(estimate.total - outside, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(
    "run", [f"{design} {world}" for design in ("dense", "moe") for world in ("on 8", "on 64", "on 1,024")]
)
def test_a_rank_sends_what_the_formula_says(run: str) -> None:
    """Each bucket once: fp32 gradients by a reduce-scatter beside the backward pass, weights by an all-gather.

    Both by an all-reduce where slices are unequal.
    """
    (config, *overrides), place = RUNS[run]
    cfg, world = load_config(ROOT / "configs" / config, overrides), place.get("world", 8)
    buckets = held_buckets(cfg, range(1, cfg.model.num_layers + 1), world=world, on_cpu=False)
    even = [held for held in buckets if held.bucket.even]
    unequal = [held for held in buckets if not held.bucket.even]
    sent = step(run).collectives
    assert sent["backward", "_reduce_scatter_base", world] == (len(even), sum(4 * x.bucket.size for x in even))
    gathered = sum(x.weight_bytes * x.bucket.size // world for x in even)
    assert sent["optimizer", "_allgather_base", world] == (len(even), gathered)
    reduced = sum(4 * x.bucket.size for x in unequal)
    assert sent.get(("backward", "allreduce", world), (0, 0)) == (len(unequal), reduced)
    # Beside these the optimizer sums two squared norms, and what was measured.
    calls, size = sent["optimizer", "allreduce", world]
    assert (calls, size) == (2 + len(unequal), 16 + sum(x.weight_bytes * x.bucket.size for x in unequal))
    assert sum(x.bucket.size for x in buckets) <= 1.2 * sum(x.bucket.elements for x in buckets)


@pytest.mark.slow
def test_upstreams_dispatcher_waits_by_name() -> None:
    counts = counted("vpmoe_stage1.yaml", *FEW, "--expert-model-parallel-size", "8", steps=1)
    found = waits(counts, "forward", "again", "backward", "other")
    assert not [site for site in found if not site.startswith((*MADE_ONCE, *DISPATCHER))]
    # Split sizes once (an event), rows of the permuted tokens twice, rows of each expert.
    assert set(waits(counts, "forward").values()) == {3, 1} and len(waits(counts, "forward")) == 5


@pytest.mark.slow
def test_all_eighty_layers() -> None:
    counts = counted("vpmoe_stage1.yaml", rank=5)  # whose slices make the most stacks of matrices
    found = waits(counts, "forward", "again", "backward", "other")
    assert not [site for site in found if not site.startswith(MADE_ONCE)]
    assert counts.total("forward").launches <= 85 * 80 and counts.total("again").launches <= 75 * 80
    assert counts.total("backward").launches <= 165 * 80 and counts.total("optimizer").launches <= 400
