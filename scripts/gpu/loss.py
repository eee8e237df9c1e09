"""What is made of logits without keeping them, over several chunks: the card against fp64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vpmoe.model.output import CrossEntropy, Divergence, Term, log_probabilities, weighted_sum
from megatron_vpmoe.runtime.device import current_device
from scripts.gpu.frame import Findings, Numbers

LIMITS = {torch.float32: 1e-4, torch.bfloat16: 1e-2}
TEACHER_IDS = 64
READINGS = ("cross-entropy", "divergence", "log-probabilities")


def numbers(dry: bool) -> Numbers:
    """Value and gradients of each reading, in fp64."""
    found = {}
    for reading in READINGS:
        for name, value in _numbers(reading, torch.float64, torch.device("cpu"), dry).items():
            found[f"{reading}/{name}"] = value
    return found


def check(findings: Findings) -> None:
    """Each reading in fp32 and bf16."""
    expected = findings.expected("loss")
    for dtype, limit in LIMITS.items():
        for reading in READINGS:
            want = {name.partition("/")[2]: x for name, x in expected.items() if name.startswith(f"{reading}/")}
            name = f"{reading}, {'fp32' if dtype == torch.float32 else 'bf16'}"
            with findings.case(name):
                findings.compare(name, _numbers(reading, dtype, current_device(), findings.dry), want, limit)


def _numbers(reading: str, dtype: torch.dtype, where: torch.device, dry: bool) -> Numbers:
    tokens, hidden_size, vocab = (96, 32, 512) if dry else (4096, 128, 50_304)
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float64) * shape[-1] ** -0.25
        return drawn.bfloat16().to(where, dtype).requires_grad_()

    hidden, projection = draw(tokens, hidden_size), draw(vocab, hidden_size)
    labels = torch.randint(0, vocab, (tokens,), generator=generator)
    weight = torch.rand(tokens, generator=generator) / tokens
    scores = torch.rand(tokens, vocab if dry else 4096, generator=generator)
    ids = scores.topk(TEACHER_IDS).indices
    log_p = torch.randn(tokens, TEACHER_IDS, generator=generator).log_softmax(-1) - 0.2
    labels, weight, ids, log_p = (x.to(where) for x in (labels, weight, ids, log_p))
    if reading == "log-probabilities":
        log_q, entropy = log_probabilities(hidden, projection, labels, entropy=True)
        assert entropy is not None
        value = (weight * (log_q + 0.01 * entropy)).sum()
    else:
        terms: list[Term] = [CrossEntropy(labels=labels, weight=weight)]
        if reading == "divergence":
            terms.append(Divergence(teacher_ids=ids, teacher_log_p=log_p, weight=weight))
        value, _ = weighted_sum(hidden, projection, terms)
    gradients = torch.autograd.grad(value, (hidden, projection))
    return {"value": value.detach(), **dict(zip(("hidden gradient", "projection gradient"), gradients, strict=True))}
