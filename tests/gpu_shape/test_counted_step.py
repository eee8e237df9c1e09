"""The full-scale step as a GPU would get it: what it asks the host to wait for, launches, moves, sends and holds."""

from __future__ import annotations

from collections import Counter

import pytest

from megatron_vpmoe.planning.counts import Counts
from tests.counted import SHORT, counted

# Where the host still waits inside the passes, each an issue of its own.
MOE_LAYER = ("transformer/moe/", "model/moe/")
DESIGNS = {
    "dense": ("vpdense_80.yaml", *SHORT),
    "moe": ("vpmoe_stage1.yaml", *SHORT, "--expert-model-parallel-size", "1"),
}


def waits(counts: Counts, *, but: tuple[str, ...] = ()) -> Counter[str]:
    """Times that the host waits between the start of the forward pass and the gradient norm, by "file:line"."""
    found = Counter[str]()
    for (of_pass, site), count in counts.syncs.items():
        if of_pass in ("forward", "backward", "again") and not site.startswith(but):
            found[site] += count
    return found


@pytest.mark.slow
@pytest.mark.parametrize("design", DESIGNS)
def test_a_step_is_counted(design: str) -> None:
    counts = counted(*DESIGNS[design])
    for of_pass in ("forward", "again", "backward", "optimizer"):
        of_all = counts.total(of_pass)
        assert of_all.launches and of_all.flops and of_all.read and of_all.written
    assert counts.total("again", "attention").flops == counts.total("forward", "attention").flops
    assert {"weights", "gradients", "optimizer state", "forward"} <= counts.peaks["backward"].keys()
    print(waits(counts))
