"""The planner's formulas against counted steps: what a prediction takes for a device's work is what it would get."""

from __future__ import annotations

from collections import defaultdict

import pytest

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.config.geometry import stage_layers
from megatron_vpmoe.planning import work
from megatron_vpmoe.planning.kernels import Cost
from tests.counted import ROOT, SHORT, counted

KEPT = ("--recompute-granularity", "null")
DESIGNS = {
    "dense": ("vpdense_80.yaml", *SHORT, *KEPT),
    "moe": ("vpmoe_stage1.yaml", *SHORT, *KEPT),
    "gated moe": ("vpmoe_stage1.yaml", *SHORT, *KEPT, "--activation", "swiglu"),
    "qwen3": ("qwen3_0_6b.yaml", "--num-layers", "4", *KEPT),
}
_SUPERVISED = 0.5  # of mock batches
AROUND = ("attention", "norms and residuals", "embedding", "forward")
"""What the ranges divide otherwise than the formulas: some norms are inside of attention."""


def by_formula(cfg: RunConfig) -> dict[tuple[str, str], list[float]]:
    """(pass, part) -> launches, FLOPs, bytes of one micro-batch."""
    tokens, layers = cfg.training.micro_batch_size * cfg.data.seq_length, stage_layers(cfg)[0]
    shape = work.Shape(cfg, tokens, tokens, 2, False, _SUPERVISED)
    passes = work.around_layers(shape, layers) + work.loss_passes(shape)
    for number in layers:
        passes += work.layer_passes(shape, number)
    found: dict[tuple[str, str], list[float]] = defaultdict(lambda: [0.0, 0.0, 0.0])
    for of_pass, pieces in (("forward", passes.forward), ("backward", passes.backward)):
        for piece in pieces:
            sums = found[of_pass, AROUND[0] if piece.part in AROUND else piece.part]
            for place, value in enumerate((piece.launches, piece.flops, piece.moved)):
                sums[place] += value
    return found


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_formulas_are_what_is_counted(design: str) -> None:
    name, *overrides = DESIGNS[design]
    counts, formulas = counted(name, *overrides, steps=1), by_formula(load_config(ROOT / "configs" / name, overrides))
    for of_pass in ("forward", "backward"):
        launches = bytes_moved = 0.0
        for (own, part), (_, flops, moved) in formulas.items():
            if own != of_pass:
                continue
            counted_parts = [counts.total(of_pass, each) for each in (AROUND if part in AROUND else (part,))]
            of_part = Cost(*map(sum, zip(*counted_parts, strict=True)))
            assert flops == pytest.approx(of_part.flops, rel=0.02), (of_pass, part)
            assert moved == pytest.approx(of_part.read + of_part.written, rel=0.25), (of_pass, part)
            launches += of_part.launches
            bytes_moved += of_part.read + of_part.written
        mine = [sum(sums[place] for (own, _), sums in formulas.items() if own == of_pass) for place in (0, 2)]
        assert mine[0] == pytest.approx(launches, rel=0.25)
        assert mine[1] == pytest.approx(bytes_moved, rel=0.15)
