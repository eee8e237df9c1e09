"""NorMuon's step: its invariants, idle experts, and what the Optimizer around it promises."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_vpmoe.config.memory import FILL_FLOPS
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.optim.matrix_layout import matrix_layout
from megatron_vpmoe.optim.matrix_stacks import Member, plan_stacks
from megatron_vpmoe.optim.normuon import NorMuon, NorMuonOptions, row_factors
from megatron_vpmoe.optim.polar_express import polar_express


def step_with(optimizer: NorMuon, *grads: torch.Tensor) -> None:
    params = [p for group in optimizer.param_groups for p in group["params"]]
    for param, grad in zip(params, grads, strict=True):
        param.grad = grad.clone()
    optimizer.step()


def clone_parameters(*params: torch.nn.Parameter) -> list[torch.nn.Parameter]:
    return [copy.deepcopy(p) for p in params]


@pytest.mark.parametrize(("rows", "cols"), [(8, 24), (24, 8), (12, 12)])
def test_rows_are_evened_out_and_the_norm_is_that_of_the_orthogonal_matrix(rows: int, cols: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(3, rows, cols, dtype=torch.float64)
    second = torch.zeros(3, rows, 1, dtype=torch.float64)
    update = polar_express(x)
    # beta2 = 0: the statistic is this step's alone, so every row ends up with exactly the same norm.
    update = update * row_factors(update, second, beta2=0.0, eps=1e-10)
    scale = max(1.0, rows / cols) ** 0.5
    row_norms = update.norm(dim=2)
    assert torch.allclose(row_norms, row_norms[:, :1].expand_as(row_norms), rtol=1e-6)
    expected = min(rows, cols) ** 0.5 * scale
    assert (update.flatten(1).norm(dim=1) / expected - 1).abs().max() < 0.15
    assert torch.allclose(second.sum((1, 2)) * cols, (update.flatten(1).norm(dim=1) / scale) ** 2)


def test_stack_size_does_not_matter() -> None:
    torch.manual_seed(0)
    fused = torch.nn.Parameter(torch.randn(12, 8, dtype=torch.float64))
    fused.matrix_rows = (slice(0, 4), torch.tensor([4, 5, 8, 9]), torch.tensor([6, 7, 10, 11]))  # type: ignore[attr-defined]
    params = [torch.nn.Parameter(torch.randn(6, 4, 8, dtype=torch.float64)), fused]
    small, large = clone_parameters(*params), clone_parameters(*params)
    grads = [torch.randn_like(p) for p in params]
    for chosen, stack_bytes in ((small, 1), (large, 2**20)):
        optimizer = NorMuon(chosen, 0.1, 0.1, stack_bytes=stack_bytes)
        for _ in range(3):
            step_with(optimizer, *grads)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(small, large, strict=True))


def test_fused_rows_are_orthogonalised_apart() -> None:
    """Scaling the gradient of V alone must not change the update of Q, as it would in one fused matrix."""
    torch.manual_seed(0)
    grad = torch.randn(12, 8, dtype=torch.float64)
    louder = grad.clone()
    louder[8:] *= 100
    moved = []
    for g in (grad, louder):
        param = torch.nn.Parameter(torch.zeros(12, 8, dtype=torch.float64))
        param.matrix_rows = (slice(0, 8), slice(8, 12))  # type: ignore[attr-defined]
        step_with(NorMuon([param], 0.1), g)
        moved.append(param.detach())
    assert torch.allclose(moved[0], moved[1], atol=1e-5)


def test_zero_gradients_only_decay_a_dense_matrix() -> None:
    param = torch.nn.Parameter(torch.randn(4, 6))
    before = param.detach().clone()
    step_with(NorMuon([param], 0.1, 0.5), torch.zeros(4, 6))
    assert torch.allclose(param, before * 0.95)


def expert_stack(shape: str) -> list[torch.nn.Parameter]:
    """Three experts in one 3-D parameter, or as three parameters of their own."""
    if shape == "stacked":
        return [torch.nn.Parameter(torch.randn(3, 4, 6))]
    params = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(3)]
    for param in params:
        param.allreduce = False  # type: ignore[attr-defined]
    return params


@pytest.mark.parametrize("shape", ["stacked", "apart"])
def test_an_expert_without_tokens_stays_as_it_is(shape: str) -> None:
    torch.manual_seed(0)
    params = expert_stack(shape)
    optimizer = NorMuon(params, 0.1, 0.5)
    grads = torch.randn(3, 4, 6)
    step_with(optimizer, *(grads[None] if shape == "stacked" else grads))

    def snapshot() -> list[torch.Tensor]:
        tensors = [[p, *optimizer.state[p].values()] for p in params]
        if shape == "stacked":
            return [torch.stack([t.detach()[e].sum() for t in tensors[0]]) for e in range(3)]
        return [torch.stack([t.detach().sum() for t in expert]) for expert in tensors]

    before = snapshot()
    grads[1] = 0
    grads[2] = 0
    grads[2, 3, 5] = 1e-30  # one tiny element is a gradient
    step_with(optimizer, *(grads[None] if shape == "stacked" else grads))
    after = snapshot()
    assert torch.equal(before[1], after[1])
    assert (before[0] != after[0]).all()
    assert before[2][0] != after[2][0]


def test_an_idle_expert_does_not_change_its_neighbours() -> None:
    torch.manual_seed(0)
    together = torch.nn.Parameter(torch.randn(2, 4, 6))
    alone = torch.nn.Parameter(together.detach()[:1].clone())
    optimizers = NorMuon([together], 0.1, 0.1), NorMuon([alone], 0.1, 0.1)
    for _ in range(3):
        grad = torch.randn(2, 4, 6)
        grad[1] = 0
        step_with(optimizers[0], grad)
        step_with(optimizers[1], grad[:1])
    assert torch.allclose(together[0], alone[0], atol=1e-6)


def test_policy_step_lets_stale_momentum_move_an_idle_expert() -> None:
    torch.manual_seed(0)
    param = torch.nn.Parameter(torch.randn(1, 4, 6))
    optimizer = NorMuon([param], 0.1, options=NorMuonOptions(idle_expert_policy="step"))
    step_with(optimizer, torch.randn(1, 4, 6))
    before = param.detach().clone()
    step_with(optimizer, torch.zeros(1, 4, 6))
    assert (param - before).norm() > 0.1


def test_parameters_without_gradient_are_left_alone() -> None:
    params = [torch.nn.Parameter(torch.randn(4, 6)) for _ in range(2)]
    before = params[1].detach().clone()
    optimizer = NorMuon(params, 0.1, 0.1)
    params[0].grad = torch.randn(4, 6)
    optimizer.step()
    assert torch.equal(params[1], before)
    step_with(optimizer, torch.randn(4, 6), torch.randn(4, 6))
    assert not torch.equal(params[1], before)


def test_groups_have_their_own_learning_rate_and_decay() -> None:
    start = torch.randn(4, 6)
    params = [torch.nn.Parameter(start.clone()) for _ in range(2)]
    optimizer = NorMuon(
        [{"params": params[:1], "lr": 0.0}, {"params": params[1:], "lr": 0.1, "weight_decay": 1.0}], 0.1
    )
    grad = torch.randn(4, 6)
    step_with(optimizer, grad, grad)
    assert torch.equal(params[0], start)
    reference = torch.nn.Parameter(start.clone())
    step_with(NorMuon([reference], 0.1, 1.0), grad)
    assert torch.equal(params[1], reference)


def test_half_precision_parameters_are_refused() -> None:
    param = torch.nn.Parameter(torch.randn(4, 6).bfloat16())
    with pytest.raises(ConfigError, match="bfloat16"):
        step_with(NorMuon([param], 0.1), torch.randn(4, 6).bfloat16())


def test_state_shapes() -> None:
    params = [torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(3, 4, 6))]
    optimizer = NorMuon(params, 0.1)
    optimizer.initialize_state()
    assert [tuple(optimizer.state[p]["momentum_buffer"].shape) for p in params] == [(4, 6), (3, 4, 6)]
    assert [tuple(optimizer.state[p]["second_moment"].shape) for p in params] == [(4, 1), (3, 4, 1)]


def test_state_dict_continues_bit_for_bit() -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(4, 6)), torch.nn.Parameter(torch.randn(3, 4, 6))]
    grads = [[torch.randn_like(p) for p in params] for _ in range(4)]
    optimizer = NorMuon(params, 0.1, 0.1)
    for g in grads[:2]:
        step_with(optimizer, *g)
    copies = clone_parameters(*params)
    resumed = NorMuon(copies, 0.1, 0.1)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for g in grads[2:]:
        step_with(optimizer, *g)
        step_with(resumed, *g)
    assert all(torch.equal(a, b) for a, b in zip(params, copies, strict=True))


@pytest.mark.parametrize("stacked", [False, True])
def test_momentum_in_bf16_is_the_fp32_one_rounded_after_each_step(stacked: bool) -> None:
    torch.manual_seed(0)
    shapes = [(3, 4, 6)] if stacked else [(4, 6), (4, 6)]
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
    weights = [p.detach().clone() for p in params]
    optimizer = NorMuon(params, 0.1, options=NorMuonOptions(momentum_dtype=torch.bfloat16))
    expected = [torch.zeros(shape, dtype=torch.bfloat16) for shape in shapes]
    for _ in range(3):
        grads = [torch.randn(shape) for shape in shapes]
        exact = [torch.lerp(m.float(), g, 1 - 0.95) for m, g in zip(expected, grads, strict=True)]
        expected = [m.bfloat16() for m in exact]
        step_with(optimizer, *grads)
        for param, weight, m, g in zip(params, weights, exact, grads, strict=True):
            update = polar_express(torch.lerp(g, m, 0.95).view(-1, 4, 6)).view_as(param)
            if torch.equal(weight, param):
                raise AssertionError("nothing moved")
            assert torch.nn.functional.cosine_similarity((weight - param).flatten(), update.flatten(), dim=0) > 0.9
            weight.copy_(param.detach())
    kept = [optimizer.state[p]["momentum_buffer"] for p in params]
    assert all(m.dtype == torch.bfloat16 for m in kept)
    assert all(torch.equal(a, b) for a, b in zip(kept, expected, strict=True))
    resumed = NorMuon(clone_parameters(*params), 0.1, options=NorMuonOptions(momentum_dtype=torch.bfloat16))
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(state["momentum_buffer"].dtype == torch.bfloat16 for state in resumed.state.values())


def test_experts_that_fill_stacks_are_stepped_in_place() -> None:
    """No copy of weights or state: the storage a stack works on is the parameter's own."""
    params = [torch.nn.Parameter(torch.randn(8, 16, 32))]
    stacks = plan_stacks([Member(p.shape, matrix_layout(p), 0) for p in params], stack_bytes=3 * 16 * 32 * 4)
    assert [stack.count for stack in stacks] == [3, 3, 2]
    for stack in stacks:
        _, ((view,),) = stack.take(params, [params], torch.float32)
        assert view.untyped_storage().data_ptr() == params[0].untyped_storage().data_ptr()


def test_matrices_filled_up_with_zeros_move_as_those_that_are_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of zeros leave the others' orthogonalised form, statistic and norm as they are."""
    shapes = [(16, 24), (7, 24), (1, 24), (24, 16), (24, 24), (7, 12)]
    torch.manual_seed(0)
    start = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
    grads = [[torch.randn_like(x) for x in start] for _ in range(3)]
    moved, stacks = [], []
    for fill_flops in (0.0, 1e9):
        monkeypatch.setitem(FILL_FLOPS, "cpu", fill_flops)
        params = [torch.nn.Parameter(x.clone()) for x in start]
        optimizer = NorMuon(params, 0.1, 0.5)
        for grad in grads:
            step_with(optimizer, *grad)
        moved.append([*params, *(value for p in params for value in optimizer.state[p].values())])
        (plan,) = optimizer._plans.values()
        stacks.append(len(plan))
    assert stacks == [6, 3]
    assert all(torch.allclose(a, b, rtol=1e-9, atol=1e-12) for a, b in zip(*moved, strict=True))
