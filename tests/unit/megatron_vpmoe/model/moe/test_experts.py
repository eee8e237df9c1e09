"""The stacked experts, in either layout of rows, against a loop over experts; and the rule that chooses the layout."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import get_default_pg_collection

from megatron_vpmoe.model.moe import experts as experts_module
from megatron_vpmoe.model.moe.expert_rows import (
    PADDED_UP_TO,
    ExpertRows,
    GroupedRows,
    PaddedRows,
    choose_layout,
    layout_rule,
)
from megatron_vpmoe.model.moe.experts import StackedExperts
from megatron_vpmoe.model.transformer_config import transformer_config
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

LOADS = [(5, 0, 3, 1, 0, 7, 2, 6), (24, 0, 0, 0, 0, 0, 0, 0), (3,) * 8, (0, 0, 0, 0, 0, 0, 0, 1)]


def looped(experts: StackedExperts, x: torch.Tensor, counts: torch.Tensor, probs: torch.Tensor) -> torch.Tensor:
    outs, begin = [], 0
    for e, count in enumerate(counts.tolist()):
        rows = slice(begin, begin + count)
        begin += count
        hidden = x[rows] @ experts.fc1_weight[e].T
        if experts.fc1_bias is not None:
            hidden = hidden + experts.fc1_bias[e]
        out = torch.relu(hidden) ** 2 @ experts.fc2_weight[e].T
        if experts.fc2_bias is not None:
            out = out + experts.fc2_bias[e]
        outs.append(out * probs[rows, None])
    return torch.cat(outs)


def random_experts(dtype: torch.dtype, *, biases: bool = True) -> StackedExperts:
    cfg = tiny_config(add_bias_linear=biases)
    experts = StackedExperts(8, transformer_config(cfg), get_default_pg_collection()).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return experts


def use(layout: type[ExpertRows], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "choose_layout", lambda *_: layout)


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("counts", LOADS)
@pytest.mark.parametrize(
    ("layout", "dtype"), [(GroupedRows, torch.float32), (PaddedRows, torch.float32), (PaddedRows, torch.float64)]
)
def test_equals_a_loop(
    counts: tuple[int, ...],
    biases: bool,
    layout: type[ExpertRows],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output, and gradients of the input, of the router's weights and of every parameter; also of experts without a
    token, whose gradient is zero."""
    use(layout, monkeypatch)
    experts = random_experts(dtype, biases=biases)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), 32, generator=generator, dtype=dtype, requires_grad=True)
    probs = torch.rand(sum(counts), generator=generator, dtype=dtype, requires_grad=True)
    tokens = torch.tensor(counts)
    inputs = [x, probs, *experts.parameters()]
    out, bias = experts(x, tokens, probs)
    expected = looped(experts, x, tokens, probs)
    assert bias is None
    weight = torch.randn(out.shape, generator=generator, dtype=dtype)
    exact = {"rtol": 1e-11, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-2}
    torch.testing.assert_close(out, expected, **exact)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    want = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, **exact)


def test_gradient_by_finite_differences() -> None:
    experts = random_experts(torch.float64)
    x = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    probs = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    counts = torch.tensor([2, 0, 3, 0, 0, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda x, p: experts(x, counts, p)[0], (x, probs))


@pytest.mark.parametrize("layout", [GroupedRows, PaddedRows])
def test_bf16_agrees_with_fp32(layout: type[ExpertRows], monkeypatch: pytest.MonkeyPatch) -> None:
    use(layout, monkeypatch)
    exact = random_experts(torch.bfloat16).float()
    rounded = random_experts(torch.bfloat16)
    counts, generator = torch.tensor(LOADS[0]), torch.Generator().manual_seed(4)
    x = torch.randn(24, 32, generator=generator).bfloat16()
    probs = torch.rand(24, generator=generator)
    grad = torch.randn(24, 32, generator=generator).bfloat16()
    results = []
    for experts, inputs in ((rounded, x.clone()), (exact, x.float())):
        weights = probs.clone().requires_grad_()
        inputs.requires_grad_()
        out, _ = experts(inputs, counts, weights)
        assert out.dtype == inputs.dtype
        out.backward(grad.to(out.dtype))
        assert weights.grad is not None and weights.grad.dtype == torch.float32
        results.append([out, inputs.grad, weights.grad, *(parameter.grad for parameter in experts.parameters())])
    for got, want in zip(*results, strict=True):
        assert got is not None and want is not None
        assert float((got.float() - want).detach().abs().max()) < 0.02 * float(want.detach().abs().max())


@pytest.mark.parametrize("layout", [GroupedRows, PaddedRows])
def test_a_gradient_of_stride_zero(layout: type[ExpertRows], monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``.sum()`` hands back; grouped GEMM refuses it as it comes."""
    use(layout, monkeypatch)
    experts = random_experts(torch.float32)
    x = torch.randn(24, 32, requires_grad=True)
    experts(x, torch.tensor(LOADS[0]), torch.ones(24))[0].sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all())


def test_no_token_at_all() -> None:
    experts = random_experts(torch.float32)
    x, probs = torch.zeros(0, 32, requires_grad=True), torch.zeros(0, requires_grad=True)
    out, _ = experts(x, torch.zeros(8, dtype=torch.int64), probs)
    assert out.shape == (0, 32)
    out.sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())
    assert x.grad is not None and probs.grad is not None, "their collectives would not be joined in the backward pass"


def test_rule() -> None:
    """Padding on a CPU up to a limit for each dtype; grouped GEMM elsewhere; padding where grouped GEMM cannot."""
    even, skewed = torch.full((8,), 4), torch.tensor([25, 1, 1, 1, 1, 1, 1, 1])
    for dtype, limit in PADDED_UP_TO.items():
        assert choose_layout(even, dtype, "cpu") is PaddedRows
        assert choose_layout(skewed, dtype, "cpu") is GroupedRows
        assert choose_layout(even, dtype, "cuda") is GroupedRows
        at_limit = torch.tensor([int(limit * 100), *[100] * 98, 200 - int(limit * 100)])
        assert choose_layout(at_limit, dtype, "cpu") is PaddedRows
        assert choose_layout(at_limit + torch.tensor([1, *[0] * 98, -1]), dtype, "cpu") is GroupedRows
        assert f"{limit:g} times" in layout_rule(dtype, "cpu") and layout_rule(dtype, "cuda") == "grouped GEMM"
    assert choose_layout(skewed, torch.float64, "cpu") is PaddedRows
    assert "float64" in layout_rule(torch.float64, "cpu")


def test_experts_follow_the_rule() -> None:
    experts = random_experts(torch.float32)
    for counts, name in (((3,) * 8, "padded"), ((24, 0, 0, 0, 0, 0, 0, 0), "grouped")):
        experts(torch.randn(24, 32), torch.tensor(counts), torch.ones(24))
        assert experts.last_layout == name
