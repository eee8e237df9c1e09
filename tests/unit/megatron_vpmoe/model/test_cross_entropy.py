"""The chunked cross-entropy equals the plain one, in value and gradient, whatever the size of its chunks."""

from __future__ import annotations

import pytest
import torch

from megatron_vpmoe.model import cross_entropy


@pytest.mark.parametrize("rows_per_chunk", [1, 3, 7, 100])
def test_equals_the_plain_one(monkeypatch: pytest.MonkeyPatch, rows_per_chunk: int) -> None:
    torch.manual_seed(0)
    hidden = torch.randn(20, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 11, (20,))
    scale = torch.rand(20)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", rows_per_chunk * 4 * 11)
    losses = cross_entropy.chunked_cross_entropy(hidden, labels, lambda h: h @ weight.T, 11)
    assert losses.dtype == torch.float32
    plain = torch.nn.functional.cross_entropy(hidden @ weight.T, labels, reduction="none")
    torch.testing.assert_close(losses.double(), plain, rtol=1e-6, atol=1e-6)
    got = torch.autograd.grad((losses * scale).sum(), (hidden, weight))
    expected = torch.autograd.grad((plain * scale).sum(), (hidden, weight))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_no_row_selected_still_has_a_gradient() -> None:
    hidden = torch.randn(4, 6, requires_grad=True)
    labels = torch.zeros(0, dtype=torch.int64)
    losses = cross_entropy.chunked_cross_entropy(hidden[:0], labels, lambda h: h @ h.new_ones(6, 5), 5)
    losses.sum().backward()
    assert hidden.grad is not None and hidden.grad.abs().max() == 0
