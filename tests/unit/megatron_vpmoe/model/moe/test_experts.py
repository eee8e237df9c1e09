"""The stacked experts, in either layout of rows, against a loop over experts; and the rule that chooses the layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_layer import get_default_pg_collection

from megatron_vpmoe.model.moe import expert_rows
from megatron_vpmoe.model.moe import experts as experts_module
from megatron_vpmoe.model.moe.expert_rows import PADDED_UP_TO, GroupedRows, PaddedRows, layout_of, layout_rule
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
        gate, up = hidden.chunk(2, dim=1)
        active = torch.sigmoid(gate) * gate * up if experts.config.gated_linear_unit else torch.relu(hidden) ** 2
        out = active @ experts.fc2_weight[e].T
        if experts.fc2_bias is not None:
            out = out + experts.fc2_bias[e]
        outs.append(out * probs[rows, None])
    return torch.cat(outs)


ACTIVATIONS = ["squared_relu", "swiglu"]


def random_experts(dtype: torch.dtype, *, biases: bool = True, activation: str = "squared_relu") -> StackedExperts:
    cfg = tiny_config(add_bias_linear=biases, activation=activation)
    experts = StackedExperts(8, transformer_config(cfg), get_default_pg_collection()).to(dtype)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return experts


def use(layout: type[GroupedRows], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        experts_module,
        "layout_of",
        lambda chosen, experts, _dtype, numbers, in_order: layout(chosen, experts, numbers, in_order=in_order),
    )


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("counts", LOADS)
@pytest.mark.parametrize(
    ("layout", "dtype"), [(GroupedRows, torch.float32), (PaddedRows, torch.float32), (PaddedRows, torch.float64)]
)
def test_equals_a_loop(
    counts: tuple[int, ...],
    biases: bool,
    activation: str,
    layout: type[GroupedRows],
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Output, and gradients of the input, of the router's weights and of every parameter; also of experts without a
    token, whose gradient is zero."""
    use(layout, monkeypatch)
    experts = random_experts(dtype, biases=biases, activation=activation)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(counts), 32, generator=generator, dtype=dtype, requires_grad=True)
    probs = torch.rand(sum(counts), generator=generator, dtype=dtype, requires_grad=True)
    tokens = torch.tensor(counts)
    inputs = [x, probs, *experts.parameters()]
    out, bias = experts(x, tokens, probs)
    expected = looped(experts, x, tokens, probs)
    assert bias is None
    weight = torch.randn(out.shape, generator=generator, dtype=dtype)
    exact: dict[str, Any] = {"rtol": 1e-11, "atol": 1e-10} if dtype == torch.float64 else {"rtol": 1e-4, "atol": 1e-2}
    torch.testing.assert_close(out, expected, **exact)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    want = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, **exact)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradient_by_finite_differences(activation: str) -> None:
    experts = random_experts(torch.float64, activation=activation)
    x = torch.randn(6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(2), requires_grad=True)
    probs = torch.rand(6, dtype=torch.float64, generator=torch.Generator().manual_seed(3), requires_grad=True)
    counts = torch.tensor([2, 0, 3, 0, 0, 0, 0, 1])
    assert torch.autograd.gradcheck(lambda x, p: experts(x, counts, p)[0], (x, probs))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", [GroupedRows, PaddedRows])
def test_bf16_agrees_with_fp32(layout: type[GroupedRows], activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(layout, monkeypatch)
    exact = random_experts(torch.bfloat16, activation=activation).float()
    rounded = random_experts(torch.bfloat16, activation=activation)
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
def test_a_gradient_of_stride_zero(layout: type[GroupedRows], monkeypatch: pytest.MonkeyPatch) -> None:
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


CPUS = {"matrix units": (True, True), "bf16": (False, True), "neither": (False, False)}


def pretend(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, has in zip(("_is_amx_tile_supported", "_is_avx512_bf16_supported"), CPUS[cpu], strict=True):
        monkeypatch.setattr(torch.cpu, name, lambda has=has: has)


@pytest.mark.parametrize("cpu", CPUS)
def test_rule(cpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Grouped, but for bf16 with a CPU's matrix units up to a limit of padding, and for what grouped cannot compute."""
    pretend(cpu, monkeypatch)
    limit = int(PADDED_UP_TO * 100)
    at_limit = [limit, *[100] * 97, 50, 250 - limit]  # 100 on average
    over = [limit + 1, *[100] * 97, 49, 250 - limit]
    for loads, few in ((at_limit, True), (over, False)):
        chosen = torch.repeat_interleave(torch.tensor(loads)).view(-1, 1)
        for dtype in (torch.float32, torch.bfloat16, torch.float64):
            padded = dtype == torch.float64 or (dtype == torch.bfloat16 and few and cpu == "matrix units")
            assert type(layout_of(chosen, 100, dtype)) is (PaddedRows if padded else GroupedRows)
    for dtype in (torch.float32, torch.bfloat16):
        assert layout_rule(dtype, "cuda") == "grouped products"
    assert "float64" in layout_rule(torch.float64, "cpu") and layout_rule(torch.float32, "cpu") == "grouped products"
    told = {"matrix units": f"{PADDED_UP_TO:g} times", "bf16": "grouped products", "neither": "in fp32"}
    assert told[cpu] in layout_rule(torch.bfloat16, "cpu")


def test_products_of_bf16_without_instructions_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 of the same numbers: rounded once, so no further from fp32's own than bf16's unit."""
    pretend("neither", monkeypatch)
    seen: list[torch.dtype] = []
    grouped = torch.nn.functional.grouped_mm

    def watched(left: torch.Tensor, *arguments: object, **keywords: object) -> torch.Tensor:
        seen.append(left.dtype)
        return grouped(left, *arguments, **keywords)  # type: ignore[arg-type]

    monkeypatch.setattr(expert_rows.functional, "grouped_mm", watched)
    rounded = random_experts(torch.bfloat16)
    exact = random_experts(torch.bfloat16).float()
    x, p, chosen = torch.randn(24, 32).bfloat16(), torch.rand(24, 2), torch.rand(24, 8).topk(2).indices
    got = rounded.of_tokens(x, chosen, p)
    got.sum().backward()
    want = exact.of_tokens(x.float(), chosen, p)
    assert set(seen) == {torch.float32} and got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0.02, atol=0.02 * float(want.detach().abs().max()))


@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**16))
def test_every_token_meets_its_experts(tokens: int, topk: int, seed: int) -> None:
    """For any choice: gathered rows are the tokens', each is added up once, values find their rows."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.rand(tokens, 5, generator=generator).topk(topk).indices
    x, p = torch.randn(tokens, 4, generator=generator), torch.rand(tokens, topk, generator=generator)
    for layout in (GroupedRows, PaddedRows):
        rows = layout(chosen, 5)
        gathered, spread = rows.gather(x), rows.spread(p)
        torch.testing.assert_close(rows.add_up(gathered * spread), x * p.sum(1, keepdim=True))
        assert torch.equal(rows.collect(spread.flatten()), p)
        dense = rows.over_experts(p)
        assert torch.equal(rows.at_experts(dense), p) and dense.sum() == pytest.approx(float(p.sum()))
        expected = torch.stack([x[(chosen == e).any(1)].sum(0) for e in range(5)])
        torch.testing.assert_close(rows.total(gathered * (spread > 0)), expected)
        numbers = torch.arange(5.0)[:, None, None].expand(5, 4, 4).contiguous()  # an expert's matrix is its number
        told = rows.linear(gathered.abs() + 1, numbers, None).sum(1) / (gathered.abs() + 1).sum(1) / 4
        torch.testing.assert_close(rows.collect(told), chosen.float())
