"""Matrices whose parts lie on two ranks are orthogonalised as if they lay on one."""

from __future__ import annotations

from pathlib import Path

import torch

from tests.workers import run_workers

SHAPES = ((8, 8), (8, 12), (12, 8))


def errors() -> dict[tuple[int, int, tuple[int, int]], float]:
    """Largest difference from the one-process result: split dimension, matrices in the stack, shape -> difference."""
    from megatron.core import parallel_state

    from megatron_vpmoe.optim.polar_express import polar_express
    from megatron_vpmoe.optim.split_matrices import Split
    from megatron_vpmoe.runtime import distributed

    distributed.initialize(seed=1, tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for dim in (0, 1):
        for count in (1, 2, 3, 4):
            for shape in SHAPES:
                stack = torch.randn(count, *shape, generator=torch.Generator().manual_seed(count))
                mine = Split(dim, group).apply_whole(stack.chunk(2, dim + 1)[group.rank()], polar_express)
                expected = polar_express(stack).chunk(2, dim + 1)[group.rank()]
                found[dim, count, shape] = float((mine - expected).abs().max())
    distributed.shutdown()
    return found


def test_parts_make_the_whole(tmp_path: Path) -> None:
    for found in run_workers(2, errors, folder=tmp_path):
        assert len(found) == 24
        assert max(found.values()) < 1e-6, found
