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


def step_errors() -> dict[tuple[int, tuple[int, int]], float]:
    """Largest difference of two steps from those of the whole matrix: split dimension, shape -> it."""
    from megatron.core import parallel_state

    from megatron_vpmoe.optim.normuon import NorMuon
    from megatron_vpmoe.runtime import distributed

    distributed.initialize(seed=1, tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for dim in (0, 1):
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(3)
            weight, *grads = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(3))
            whole = torch.nn.Parameter(weight.clone())
            mine = torch.nn.Parameter(weight.chunk(2, dim)[group.rank()].clone())
            mine.tensor_model_parallel, mine.partition_dim = True, dim  # type: ignore[attr-defined]
            alone, split = NorMuon([whole], lr=0.1), NorMuon([mine], lr=0.1, tp_group=group)
            for grad in grads:
                whole.grad, mine.grad = grad.clone(), grad.chunk(2, dim)[group.rank()].clone()
                alone.step()
                split.step()
            found[dim, shape] = float((mine - whole.chunk(2, dim)[group.rank()]).abs().max())
    distributed.shutdown()
    return found


def test_a_step_of_the_parts_is_a_step_of_the_whole(tmp_path: Path) -> None:
    for found in run_workers(2, step_errors, folder=tmp_path):
        assert len(found) == 2 * len(SHAPES)
        assert max(found.values()) < 1e-9, found


def test_parts_make_the_whole(tmp_path: Path) -> None:
    for found in run_workers(2, errors, folder=tmp_path):
        assert len(found) == 24
        assert max(found.values()) < 1e-6, found
