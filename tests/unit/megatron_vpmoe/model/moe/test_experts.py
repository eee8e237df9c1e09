"""The stacked experts against a loop over experts."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import get_default_pg_collection

from megatron_vpmoe.model.moe.experts import StackedExperts
from megatron_vpmoe.model.transformer_config import transformer_config
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")


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


@pytest.mark.parametrize("biases", [True, False])
@pytest.mark.parametrize("counts", [(5, 0, 3, 1, 0, 7, 2, 6), (24, 0, 0, 0, 0, 0, 0, 0), (3,) * 8])
def test_equals_a_loop(counts: tuple[int, ...], biases: bool) -> None:
    cfg = tiny_config(add_bias_linear=biases)
    experts = StackedExperts(8, transformer_config(cfg), get_default_pg_collection())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(sum(counts), 32, generator=generator, requires_grad=True)
    probs = torch.rand(sum(counts), generator=generator, requires_grad=True)
    tokens = torch.tensor(counts)
    inputs = [x, probs, *experts.parameters()]
    out, bias = experts(x, tokens, probs)
    expected = looped(experts, x, tokens, probs)
    assert bias is None
    weight = torch.randn(out.shape, generator=generator)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-3)
    got = torch.autograd.grad((out * weight).sum(), inputs)
    want = torch.autograd.grad((expected * weight).sum(), inputs, allow_unused=True)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, torch.zeros_like(g) if w is None else w, rtol=1e-3, atol=1e-2)


def test_no_token_at_all() -> None:
    experts = StackedExperts(8, transformer_config(tiny_config()), get_default_pg_collection())
    out, _ = experts(torch.zeros(0, 32, requires_grad=True), torch.zeros(8, dtype=torch.int64), torch.zeros(0))
    assert out.shape == (0, 32)
    out.sum().backward()
