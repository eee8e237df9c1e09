"""The two forms of the sink are one function."""

from __future__ import annotations

import torch

from megatron_vpmoe.model.attention.sink import absorb_sink, softmax_with_sink


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_correction_by_lse_equals_the_definition_forward_and_backward() -> None:
    score, value, sink = (x.requires_grad_() for x in (draw(2, 3, 4, 5), draw(2, 3, 5, 6, seed=1), 2 * draw(3, seed=2)))
    by_definition = softmax_with_sink(score, sink) @ value
    out, lse = torch.softmax(score, -1) @ value, torch.logsumexp(score, -1)
    by_lse, full = absorb_sink(out, lse, sink.view(1, 3, 1))
    torch.testing.assert_close(by_lse, by_definition, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(full, torch.log(score.exp().sum(-1) + sink.exp().view(1, 3, 1)), rtol=1e-12, atol=1e-12)
    cotangent = draw(2, 3, 4, 6, seed=3)
    for mine, theirs in zip(
        torch.autograd.grad(by_lse, (score, value, sink), cotangent),
        torch.autograd.grad(by_definition, (score, value, sink), cotangent),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


def test_a_large_sink_takes_the_mass_without_overflow() -> None:
    score, sink = torch.zeros(1, 2, 1, 3), torch.tensor([1e4, -1e4])
    weight = softmax_with_sink(score, sink)
    assert weight[0, 0].sum() == 0 and weight[0, 1].sum() == 1
    out, lse = absorb_sink(torch.ones(1, 2, 1, 4), torch.zeros(1, 2, 1), sink.view(1, 2, 1))
    assert out[0, 0].sum() == 0 and out[0, 1].sum() == 4 and lse.isfinite().all()
