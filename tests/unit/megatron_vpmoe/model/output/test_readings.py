"""Log-probabilities, entropies and divergences equal their definitions, in value and gradient, in any chunks."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from megatron_vpmoe.model.output import CrossEntropy, Divergence, chunks, likeliest, log_probabilities, weighted_sum
from ref import output as reference

TAILS = ("bucket", "drop", "renormalise")
BETAS = (0.0, 0.3, 1.0)


def draw(tokens: int, hidden: int, vocab: int, ids: int, *, seed: int = 0, sharp: float = 1.0) -> dict[str, Tensor]:
    """Everything in fp64; the teacher's log-probabilities are those of a whole distribution."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    teacher_log_p, teacher_ids = (sharp * normal(tokens, vocab)).log_softmax(-1).topk(ids)
    return {
        "hidden": sharp * normal(tokens, hidden),
        "projection": normal(vocab, hidden),
        "labels": torch.randint(0, vocab, (tokens,), generator=generator),
        "weight": normal(tokens),
        "other_weight": normal(tokens),
        "ids": teacher_ids,
        "log_p": teacher_log_p,
    }


def gradients(
    inputs: dict[str, Tensor], function: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """The value of ``function`` and its gradients by hidden states and projection, in fp64."""
    leaves = [inputs[name].to(dtype).clone().requires_grad_() for name in ("hidden", "projection")]
    value = function(*leaves)
    return [x.detach().double() for x in (value, *torch.autograd.grad(value, leaves))]


def of_log_probabilities(inputs: dict[str, Tensor]) -> tuple[Callable, Callable]:
    """A sum to which log-probabilities and entropies contribute in a way of which no weight is known beforehand."""

    def combined(log_p: Tensor, entropy: Tensor) -> Tensor:
        weight = inputs["weight"].to(log_p.dtype)
        return (weight * (0.3 * log_p).exp()).sum() + (inputs["other_weight"].to(log_p.dtype) * entropy).square().sum()

    def ours(hidden: Tensor, projection: Tensor) -> Tensor:
        return combined(*log_probabilities(hidden, projection, inputs["labels"], entropy=True))

    def plain(hidden: Tensor, projection: Tensor) -> Tensor:
        rows = reference.logits(hidden, projection)
        log_p = [reference.log_probability(row, int(label)) for row, label in zip(rows, inputs["labels"], strict=True)]
        return combined(torch.stack(log_p), torch.stack([reference.entropy(row) for row in rows]))

    return ours, plain


def of_log_probabilities_alone(inputs: dict[str, Tensor]) -> tuple[Callable, Callable]:
    def ours(hidden: Tensor, projection: Tensor) -> Tensor:
        log_p, entropy = log_probabilities(hidden, projection, inputs["labels"])
        assert entropy is None
        return log_p.sin().sum()

    def plain(hidden: Tensor, projection: Tensor) -> Tensor:
        log_p = (hidden.double() @ projection.double().T).log_softmax(-1)
        return log_p.gather(-1, inputs["labels"].unsqueeze(-1)).sin().sum()

    return ours, plain


def of_divergence(
    inputs: dict[str, Tensor], beta: float, tail: str, temperature: float, *, mixed: bool = True
) -> tuple[Callable, Callable]:
    """A divergence, and beside it the cross-entropy of labels."""

    def ours(hidden: Tensor, projection: Tensor) -> Tensor:
        teacher = Divergence(
            teacher_ids=inputs["ids"],
            teacher_log_p=inputs["log_p"],
            weight=inputs["weight"],
            beta=beta,
            tail=tail,  # type: ignore[arg-type]
            temperature=temperature,
        )
        beside = [CrossEntropy(labels=inputs["labels"], weight=inputs["other_weight"])] if mixed else []
        total, told = weighted_sum(hidden, projection, [*beside, teacher])
        assert all(values.shape[1:] == inputs["labels"].shape and not values.requires_grad for values in told)
        log_q = ((hidden @ projection.T).to(told[-1].dtype) / temperature).log_softmax(-1).detach()
        of_first = log_q.gather(-1, inputs["ids"][:, :1]).squeeze(-1)
        torch.testing.assert_close(told[-1][1].exp(), of_first.exp(), rtol=1e-5, atol=1e-5)
        assert torch.equal(told[-1][2].bool(), of_first == log_q.amax(-1))
        return total

    def plain(hidden: Tensor, projection: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for n, row in enumerate(reference.logits(hidden, projection)):
            how = {"beta": beta, "tail": tail, "temperature": temperature}
            total = total + inputs["weight"][n] * reference.divergence(row, inputs["ids"][n], inputs["log_p"][n], **how)
            if mixed:
                log_p = reference.log_probability(row, int(inputs["labels"][n]))
                total = total - inputs["other_weight"][n] * log_p
        return total

    return ours, plain


@settings(max_examples=40, derandomize=True)
@given(
    tokens=st.integers(1, 13),
    vocab=st.integers(1, 30),
    percent=st.integers(0, 100),
    rows_a_chunk=st.integers(1, 14),
    sharp=st.sampled_from([0.1, 1.0, 6.0]),
    beta=st.sampled_from(BETAS),
    tail=st.sampled_from(TAILS),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    mixed=st.booleans(),
    filling=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_readings_equal_their_definitions(
    tokens, vocab, percent, rows_a_chunk, sharp, beta, tail, temperature, mixed, filling, seed
) -> None:
    inputs = draw(tokens, 5, vocab, max(1, vocab * percent // 100), seed=seed, sharp=sharp)
    if filling and inputs["ids"].shape[-1] < vocab:
        inputs["log_p"][::2, 1:] = -100.0
    pairs = [
        of_log_probabilities(inputs),
        of_log_probabilities_alone(inputs),
        of_divergence(inputs, beta, tail, temperature, mixed=mixed),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", rows_a_chunk * 8 * vocab)
        got = [gradients(inputs, ours, torch.float64) for ours, _ in pairs]
    for mine, (_, plain) in zip(got, pairs, strict=True):
        for ours, theirs in zip(mine, gradients(inputs, plain, torch.float64), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@settings(max_examples=12, derandomize=True)
@given(
    vocab=st.integers(1, 30),
    percent=st.integers(0, 100),
    kept=st.integers(0, 100),
    rows_a_chunk=st.integers(1, 14),
    temperature=st.sampled_from([0.5, 1.0, 2.0]),
    seed=st.integers(0, 2**16),
)
def test_the_likeliest_ids_are_those_of_whole_distributions(
    vocab, percent, kept, rows_a_chunk, temperature, seed
) -> None:
    """Among all ids or some; what lies outside them keeps its probability."""
    inputs = draw(9, 5, vocab, 1, seed=seed)
    among = torch.randperm(vocab)[: max(1, vocab * kept // 100)].sort().values
    count = max(1, len(among) * percent // 100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK_BYTES", rows_a_chunk * 8 * vocab)
        ids, log_p, of_label = likeliest(
            inputs["hidden"], inputs["projection"], inputs["labels"], count, temperature=temperature, among=among
        )
    whole = (reference.logits(inputs["hidden"], inputs["projection"]) / temperature).log_softmax(-1)
    values, places = whole[:, among].topk(count)
    assert torch.equal(ids, among[places])
    torch.testing.assert_close(log_p, values, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(of_label, whole.gather(-1, inputs["labels"].unsqueeze(-1)).squeeze(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("reading", ["log_probabilities", *((b, t) for b in BETAS for t in TAILS)])
def test_rounding_is_that_of_the_dtype(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, reading) -> None:
    """Against fp64 on the rounded inputs; bf16 rounds the logits, to 2^-9 of themselves."""
    inputs = draw(60, 12, 40, 6)
    inputs |= {name: inputs[name].to(dtype).double() for name in ("hidden", "projection")}
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 17 * 8 * 40)
    if reading == "log_probabilities":
        ours, plain = of_log_probabilities(inputs)
    else:
        ours, plain = of_divergence(inputs, *reading, temperature=1.5)
    bound = 2e-6 if dtype == torch.float32 else 2e-2
    for mine, exact in zip(gradients(inputs, ours, dtype), gradients(inputs, plain, torch.float64), strict=True):
        assert (mine - exact).norm() <= bound * exact.norm()


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("tail", TAILS)
def test_with_all_ids_it_is_the_divergence_of_whole_distributions(beta: float, tail: str) -> None:
    """In fp32, whose rounding leaves a tail of 1e-7 that is none."""
    inputs = draw(50, 8, 33, 33)
    inputs |= {name: inputs[name].float().double() for name in ("hidden", "projection", "log_p")}
    ours, _ = of_divergence(inputs, beta, tail, 1.0, mixed=False)
    log_p = torch.full((50, 33), -math.inf, dtype=torch.float64).scatter(-1, inputs["ids"], inputs["log_p"])

    def whole(hidden: Tensor, projection: Tensor) -> Tensor:
        def kl(p: Tensor, q: Tensor) -> Tensor:
            return functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)

        log_q = (hidden @ projection.T).log_softmax(-1)
        if beta in (0.0, 1.0):
            losses = kl(log_p, log_q) if beta == 0 else kl(log_q, log_p)
        else:
            log_m = (beta * log_p.exp() + (1 - beta) * log_q.exp()).log()
            losses = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
        return (inputs["weight"] * losses).sum()

    for mine, exact in zip(
        gradients(inputs, ours, torch.float32), gradients(inputs, whole, torch.float64), strict=True
    ):
        assert (mine - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize("beta", BETAS)
def test_a_tiny_tail_of_the_student_does_not_vanish(beta: float) -> None:
    """Q has 1e-7 outside the ids, P has 0.3 there: in 1 - sum an fp32 sum leaves nothing of it."""
    hidden = torch.eye(4)[:1].requires_grad_()
    projection = torch.tensor([0.0, 0.3, math.log(1e-7), math.log(2e-7)])[:, None] * torch.eye(4)[0]
    inputs = {"ids": torch.tensor([[0, 1]]), "log_p": torch.tensor([[0.3, 0.4]]).log(), "weight": torch.ones(1)}
    inputs |= {"hidden": hidden.detach(), "projection": projection, "labels": inputs["ids"][:, 0]}
    inputs["other_weight"] = torch.zeros(1)
    ours, plain = of_divergence(inputs, beta, "bucket", 1.0)
    for mine, exact in zip(
        gradients(inputs, ours, torch.float32), gradients(inputs, plain, torch.float64), strict=True
    ):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-8)


def test_a_teacher_without_a_tail_stays_finite() -> None:
    """Its probabilities sum to one or more after rounding, and an entry may be -inf."""
    inputs = draw(3, 4, 9, 3)
    inputs["log_p"] = torch.tensor([[0.0, -math.inf, -math.inf], [1e-7, -17.0, -18.0], [-0.5, -1.5, -2.0]]).double()
    for beta in BETAS:
        for tail in TAILS:
            ours, _ = of_divergence(inputs, beta, tail, 1.0)
            assert all(value.isfinite().all() for value in gradients(inputs, ours, torch.float32))


def test_what_is_no_divergence_is_refused() -> None:
    for wrong in ({"beta": -0.1}, {"beta": 1.1}, {"temperature": 0.0}, {"tail": "cut"}):
        with pytest.raises(ValueError, match="a divergence of beta"):
            Divergence(teacher_ids=torch.zeros(1, 1), teacher_log_p=torch.zeros(1, 1), weight=torch.ones(1), **wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("home", ["grad", "main_grad"])
def test_log_probabilities_sum_the_projections_gradient_in_fp32(monkeypatch: pytest.MonkeyPatch, home: str) -> None:
    inputs = draw(3000, 6, 9, 1, sharp=0.2)
    hidden, projection = (inputs[name].bfloat16().requires_grad_() for name in ("hidden", "projection"))
    hidden = (hidden.detach() + 1).requires_grad_()
    labels = inputs["labels"] * 0
    exact_leaf = projection.detach().double().requires_grad_()
    (hidden.detach().double() @ exact_leaf.T).log_softmax(-1)[:, 0].sum().backward()
    if home == "main_grad":
        projection.main_grad = torch.ones(9, 6)  # type: ignore[attr-defined]
    monkeypatch.setattr(chunks, "CHUNK_BYTES", 2 * 6 * 9)
    log_probabilities(hidden, projection, labels)[0].sum().backward()
    assert projection.grad is not None and exact_leaf.grad is not None
    got = projection.grad.double()
    if home == "main_grad":
        assert not got.any()
        got = projection.main_grad.double() - 1  # type: ignore[attr-defined]
    assert (got - exact_leaf.grad).norm() <= (2**-8 if home == "grad" else 3e-4) * exact_leaf.grad.norm()


def test_of_no_tokens_there_is_a_zero_gradient() -> None:
    inputs = draw(2, 4, 7, 3)
    none = {name: value if name == "projection" else value[:0] for name, value in inputs.items()}
    for ours, _ in (of_log_probabilities(none), of_divergence(none, 0.0, "bucket", 1.0)):
        assert not any(value.any() for value in gradients(none, ours, torch.float32))
