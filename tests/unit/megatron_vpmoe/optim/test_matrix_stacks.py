"""Logical matrices and their stacks: every row once, gathered and scattered without loss."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.optim.matrix_layout import matrix_layout
from megatron_vpmoe.optim.matrix_stacks import Member, plan_stacks


def parameter(*shape: int, rows: object = None, allreduce: bool = True) -> torch.nn.Parameter:
    param = torch.nn.Parameter(torch.randn(shape))
    if rows is not None:
        param.matrix_rows = rows  # type: ignore[attr-defined]
    param.allreduce = allreduce  # type: ignore[attr-defined]
    return param


def test_layouts() -> None:
    assert matrix_layout(parameter(4, 3)).matrices == (((0, 4),),)
    fused = parameter(6, 3, rows=(torch.tensor([0, 1, 3, 4]), torch.tensor([2, 5])))
    assert matrix_layout(fused).matrices == (((0, 2), (3, 2)), ((2, 1), (5, 1)))
    assert matrix_layout(parameter(6, 3, rows=(slice(0, 4), slice(4, 6)))).count == 2
    assert matrix_layout(parameter(5, 6, 3)) == ((), 5, True, None)
    assert matrix_layout(parameter(6, 3, allreduce=False)).routed
    gated = matrix_layout(parameter(5, 6, 3, rows=(slice(0, 3), slice(3, 6))))
    assert gated == ((), 10, True, None)
    assert torch.equal(gated.unfused(torch.arange(30).view(5, 6, 1))[3].flatten(), torch.arange(9, 12))
    assert not matrix_layout(parameter(6, 3)).routed
    columns = parameter(6, 3)
    columns.tensor_model_parallel, columns.partition_dim = True, 1  # type: ignore[attr-defined]
    assert matrix_layout(columns).split is None
    assert matrix_layout(columns, tensor_parallel=True).split == 1
    assert matrix_layout(parameter(6, 3), tensor_parallel=True).split is None


@pytest.mark.parametrize("rows", [(slice(0, 4),), (slice(0, 4), slice(3, 6)), (torch.tensor([0, 1, 2, 3, 4, 4]),)])
def test_rows_must_be_partitioned(rows: tuple) -> None:
    with pytest.raises(ConfigError, match="matrix_rows of qkv"):
        matrix_layout(parameter(6, 3, rows=rows), "qkv")


@pytest.mark.parametrize("rows", [(slice(0, 4), slice(4, 6)), (slice(3, 6), slice(0, 3))])
def test_the_matrices_of_an_expert_are_equally_high_and_in_order(rows: tuple) -> None:
    with pytest.raises(ConfigError, match="matrix_rows of fc1 are of"):
        matrix_layout(parameter(5, 6, 3, rows=rows), "fc1")


@pytest.mark.parametrize("shape", [(), (4,), (2, 2, 2, 2)])
def test_other_dimensions_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match="sink has shape"):
        matrix_layout(parameter(*shape), "sink")


@settings(max_examples=50)
@given(
    experts=st.lists(st.integers(1, 9), max_size=3),
    splits=st.lists(st.permutations(range(6)), max_size=4),
    stack_bytes=st.sampled_from([1, 100, 400, 10_000]),
    fill_flops=st.sampled_from([0.0, 1e3, 1e9]),
)
def test_put_after_take_is_the_identity(
    experts: list[int], splits: list[list[int]], stack_bytes: int, fill_flops: float
) -> None:
    params = [parameter(count, 4, 5) for count in experts]
    params += [parameter(6, 5, rows=(torch.tensor(p[:4]), torch.tensor(p[4:]))) for p in splits]
    members = [Member(p.shape, matrix_layout(p), i % 2) for i, p in enumerate(params)]
    values, statistics = [p.detach() for p in params], [torch.randn(*p.shape[:-1], 1) for p in params]
    plan = plan_stacks(members, stack_bytes=stack_bytes, fill_flops=fill_flops)
    for dtype in (torch.float32, torch.float64):
        doubled, doubled_statistics = [v.clone() for v in values], [v.clone() for v in statistics]
        for stack in plan:
            assert all(members[segment.index].group == stack.group for segment in stack.segments)
            assert stack.count == 1 or stack.count * stack.rows * stack.cols * 4 <= stack_bytes
            statistic_NR1, (pieces,) = stack.take(doubled_statistics, [doubled], dtype)
            assert statistic_NR1.shape == (stack.count, stack.rows, 1) and sum(map(len, pieces)) == stack.count
            assert stack.has_gaps == any((x == 0).all(-1).any() for x in pieces)
            for tensor in (statistic_NR1, *pieces):
                tensor.mul_(2)
            stack.put(doubled_statistics, statistic_NR1, [(doubled, pieces)])
        for before, after in ((values, doubled), (statistics, doubled_statistics)):
            assert all(torch.equal(2 * a, b) for a, b in zip(before, after, strict=True))
    assert sum(stack.count for stack in plan) == sum(m.layout.count for m in members)


def test_a_scattered_matrix_keeps_its_row_order() -> None:
    param = parameter(6, 2, rows=(torch.tensor([4, 0, 1]), torch.tensor([5, 2, 3])))
    (stack,) = plan_stacks([Member(param.shape, matrix_layout(param), 0)], stack_bytes=10_000)
    gathered = torch.empty(2, 3, 2)
    for segment in stack.segments:
        segment.in_stack(gathered).copy_(segment.in_param([param.detach()]))
    assert torch.equal(gathered[0], param[[4, 0, 1]])
    assert torch.equal(gathered[1], param[[5, 2, 3]])
