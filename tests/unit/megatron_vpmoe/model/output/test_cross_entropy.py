"""The chunked cross-entropy equals the plain one, in value and gradient, whatever the size of its chunks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.output import CrossEntropy, chunks, weighted_sum
from tests.tiny import random_batch, tiny_config

Inputs = tuple[Tensor, Tensor, Tensor, Tensor]


def draw(tokens: int, hidden: int, vocab: int, *, seed: int = 0, sharp: float = 1.0) -> Inputs:
    """Hidden states, projection, labels and weights in fp64; ``sharp`` scales the logits."""
    generator = torch.Generator().manual_seed(seed)
    return (
        sharp * torch.randn(tokens, hidden, generator=generator, dtype=torch.float64),
        torch.randn(vocab, hidden, generator=generator, dtype=torch.float64),
        torch.randint(0, vocab, (tokens,), generator=generator),
        torch.rand(tokens, generator=generator, dtype=torch.float64) - 0.2,
    )


def weighted_cross_entropy(hidden: Tensor, projection: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    total, (told,) = weighted_sum(hidden, projection, [CrossEntropy(labels=labels, weight=weight)])
    return total, told[0]


def plain(hidden: Tensor, projection: Tensor, labels: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    logits = functional.linear(hidden, projection)
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    losses = functional.cross_entropy(wide, labels, reduction="none")
    return (losses * weight).sum(), losses.detach()


def with_gradients(function, inputs: Inputs, dtype: torch.dtype, factor: float = 1.7) -> list[Tensor]:
    hidden, projection = (x.to(dtype).requires_grad_() for x in inputs[:2])
    total, losses = function(hidden, projection, inputs[2], inputs[3].to(torch.promote_types(dtype, torch.float32)))
    gradients = torch.autograd.grad(factor * total, (hidden, projection))
    assert [g.dtype for g in gradients] == [dtype, dtype]
    return [total.detach(), losses, *gradients]


@settings(max_examples=60)
@given(
    tokens=st.integers(0, 23),
    hidden=st.integers(1, 9),
    vocab=st.integers(1, 40),
    rows_a_chunk=st.integers(1, 25),
    sharp=st.sampled_from([0.1, 1.0, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_equals_the_plain_one(tokens: int, hidden: int, vocab: int, rows_a_chunk: int, sharp: float, seed: int) -> None:
    inputs = draw(tokens, hidden, vocab, seed=seed, sharp=sharp)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", rows_a_chunk * 8 * vocab)
        got = with_gradients(weighted_cross_entropy, inputs, torch.float64)
    for mine, theirs in zip(got, with_gradients(plain, inputs, torch.float64), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("sharp", [0.2, 4.0])
def test_rounding_is_that_of_the_plain_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, sharp: float) -> None:
    """Against fp64 on the rounded inputs, of which both compute; sharp logits leave most tokens nearly certain."""
    inputs = draw(200, 24, 50, sharp=sharp)
    inputs = (inputs[0].to(dtype).double(), inputs[1].to(dtype).double(), *inputs[2:])
    likely = (inputs[0] @ inputs[1].T).argmax(-1)
    inputs = (*inputs[:2], torch.where(torch.arange(200) % 4 > 0, likely, inputs[2]), inputs[3])
    exact = with_gradients(plain, inputs, torch.float64)
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 64 * 6 * 50)
    ours, theirs = (with_gradients(f, inputs, dtype) for f in (weighted_cross_entropy, plain))
    assert ours[0].dtype == ours[1].dtype == torch.float32
    for mine, other, truth in zip(ours, theirs, exact, strict=True):
        # A product of a few chunks is rounded once a chunk.
        assert (mine - truth).norm() <= 2 * (other - truth).norm() + 1e-6 * truth.norm()


@pytest.mark.parametrize("home", ["grad", "main_grad"])
def test_many_chunks_round_the_projections_gradient_once(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    """bf16 weights against fp64: thousands of chunks whose shares are each too small to move a sum kept in bf16.

    With Megatron-Core's fp32 ``main_grad`` the gradient is never rounded to bf16, and autograd adds nothing to it.
    """
    drawn = draw(4000, 6, 9, sharp=0.2)
    hidden, projection = ((drawn[0] + 1).bfloat16().requires_grad_(), drawn[1].bfloat16().requires_grad_())
    inputs = (hidden.detach().double(), projection.detach().double(), drawn[2] * 0, drawn[3].abs())
    exact = with_gradients(plain, inputs, torch.float64, 1.0)[3]
    if home == "main_grad":
        projection.main_grad = torch.zeros(9, 6)  # type: ignore[attr-defined]
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 6 * 9)
    weighted_cross_entropy(hidden, projection, inputs[2], inputs[3].float())[0].backward()
    assert projection.grad is not None and projection.grad.dtype == torch.bfloat16
    got = projection.grad.double()
    if home == "main_grad":
        got += projection.main_grad  # type: ignore[attr-defined]
    assert (got - exact).norm() <= (2**-9 if home == "grad" else 1e-4) * exact.norm()


def test_gradient_of_a_nearly_certain_token_is_not_rounding() -> None:
    """At p = 1 - 1e-6 a bf16 probability is 1; its gradient has to come from the loss."""
    hidden = torch.tensor([[1.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    projection = torch.tensor([[14.0, 0.0], [0.0, 0.0]], dtype=torch.bfloat16)
    total, _ = weighted_cross_entropy(hidden, projection, torch.tensor([0]), torch.ones(1))
    (got,) = torch.autograd.grad(total, hidden)
    assert got[0, 0].item() == pytest.approx(-14 / (1 + torch.tensor(14.0).exp().item()), rel=1e-2)


def test_no_token_still_has_a_gradient() -> None:
    hidden, projection = torch.randn(4, 6, requires_grad=True), torch.randn(5, 6, requires_grad=True)
    total, losses = weighted_cross_entropy(hidden[:0], projection, torch.zeros(0, dtype=torch.int64), torch.zeros(0))
    total.backward()
    assert float(total.detach()) == 0 and losses.shape == (0,)
    for leaf in (hidden, projection):
        assert leaf.grad is not None and not leaf.grad.any()


def test_gradients_are_made_for_what_needs_them_only() -> None:
    hidden, projection, labels, weight = draw(5, 3, 7)
    total, _ = weighted_cross_entropy(hidden.requires_grad_(), projection, labels, weight)
    total.backward()
    assert hidden.grad is not None and projection.grad is None
    with torch.no_grad():
        total, losses = weighted_cross_entropy(hidden, projection, labels, weight)
    assert not total.requires_grad and not losses.requires_grad


def test_a_second_backward_pass_is_refused() -> None:
    hidden, projection, labels, weight = draw(5, 3, 7)
    total, _ = weighted_cross_entropy(hidden.requires_grad_(), projection, labels, weight)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="can be taken once"):
        total.backward()


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("tied", [False, True])
def test_a_models_loss_equals_its_logits_loss(tied: bool) -> None:
    """Over the supervised positions of packed, padded rows; every parameter's gradient, tied embeddings included."""
    batch, results = random_batch(2, 40, 64, seed=3), []
    weight = torch.rand(batch.labels.shape)
    for chunked in (True, False):
        torch.manual_seed(1)
        model = build_model(tiny_config(untie_embeddings_and_output_weights=not tied, num_experts=None))
        output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
        mask = batch.loss_mask
        if chunked:
            total, losses = output.cross_entropy(batch.labels, mask, weight)
        else:
            losses = functional.cross_entropy(output.logits()[mask], batch.labels[mask], reduction="none")
            total = (losses * weight[mask]).sum()
        total.backward()
        results.append((losses, {name: p.grad for name, p in model.named_parameters()}))
    torch.testing.assert_close(results[0][0], results[1][0].detach())
    for name, expected in results[1][1].items():
        torch.testing.assert_close(results[0][1][name], expected, rtol=1e-5, atol=1e-6, msg=name)
