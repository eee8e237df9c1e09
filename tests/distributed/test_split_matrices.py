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


def blockwise_errors() -> dict[tuple[int, tuple[int, int]], float]:
    """Largest difference of a first blockwise step from the formulas on the blocks: split dimension, shape -> it."""
    from megatron.core import parallel_state

    from megatron_vpmoe.optim.normuon import NorMuon, NorMuonOptions
    from megatron_vpmoe.runtime import distributed

    distributed.initialize(seed=1, tensor_model_parallel_size=2)
    group = parallel_state.get_tensor_model_parallel_group()
    found = {}
    for dim in (0, 1):
        for shape in SHAPES:
            generator = torch.Generator().manual_seed(3)
            weight, grad = (torch.randn(*shape, generator=generator, dtype=torch.float64) for _ in range(2))
            mine = torch.nn.Parameter(weight.chunk(2, dim)[group.rank()].clone())
            mine.tensor_model_parallel, mine.partition_dim = True, dim  # type: ignore[attr-defined]
            mine.grad = grad.chunk(2, dim)[group.rank()].clone()
            NorMuon([mine], lr=0.1, options=NorMuonOptions(blockwise=True), tp_group=group).step()
            expected = _blockwise_step(weight, grad, dim).chunk(2, dim)[group.rank()]
            found[dim, shape] = float((mine.detach() - expected).abs().max())
    distributed.shutdown()
    return found


def _blockwise_step(weight: torch.Tensor, grad: torch.Tensor, dim: int) -> torch.Tensor:
    """The whole matrix after a first step without decay, by the reference on its two blocks."""
    from ref.normuon import polar_express as reference

    blocks = [torch.from_numpy(reference((block * (1 - 0.95**2)).numpy())) for block in grad.chunk(2, dim)]
    update = torch.cat(blocks, dim) * (min(grad.shape) / (2 * min(blocks[0].shape))) ** 0.5
    statistic = 0.05 * update.square().mean(1, keepdim=True)
    normed = update / (statistic + 1e-10).sqrt()
    normed *= update.norm() / normed.norm() * max(1.0, grad.shape[0] / grad.shape[1]) ** 0.5
    return weight - 0.1 * normed


def test_blockwise_every_part_is_a_matrix(tmp_path: Path) -> None:
    for found in run_workers(2, blockwise_errors, folder=tmp_path):
        assert len(found) == 2 * len(SHAPES)
        assert max(found.values()) < 1e-9, found


def test_parts_make_the_whole(tmp_path: Path) -> None:
    for found in run_workers(2, errors, folder=tmp_path):
        assert len(found) == 24
        assert max(found.values()) < 1e-6, found
