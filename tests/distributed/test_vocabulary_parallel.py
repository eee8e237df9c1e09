"""With the vocabulary split over two ranks the loss and its gradients are those of one process, and of upstream's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from tests.workers import run_workers

ROWS, SEQ, HIDDEN, VOCAB = 2, 12, 7, 22
DIVERGENCES = [(0.0, "bucket", 2.0), (1.0, "bucket", 1.0), (0.4, "bucket", 1.0), (0.0, "drop", 1.0)]
AMONG = [1, 2, 5, 9, 10, 12, 20]  # of the first rank more than of the second
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def inputs(sharp: float) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(4)
    return (
        sharp * torch.randn(ROWS, SEQ, HIDDEN, generator=generator, dtype=torch.float64),
        torch.randn(VOCAB, HIDDEN, generator=generator, dtype=torch.float64),
        torch.randint(0, VOCAB, (ROWS, SEQ), generator=generator),
        torch.rand(ROWS, SEQ, generator=generator) < 0.7,
        torch.rand(ROWS, SEQ, generator=generator, dtype=torch.float64),
    )


def all_cases(cases: list[float]) -> list[dict[str, Any]]:
    from megatron_vpmoe.runtime import distributed

    distributed.initialize(seed=1, tensor_model_parallel_size=2)
    results = [split_loss(sharp) for sharp in cases]
    distributed.shutdown()
    return results


def split_loss(sharp: float) -> dict[str, Any]:
    """The loss, the hidden states' gradient, and that of this rank's words."""
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
    from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region

    from megatron_vpmoe.model.output import ModelOutput, chunks

    rank = parallel_state.get_tensor_model_parallel_rank()
    chunks.CHUNK_BYTES = 5 * 8 * VOCAB // 2  # several chunks, the last one smaller
    hidden, projection, labels, mask, weight = inputs(sharp)
    leaf = hidden.clone().requires_grad_()
    words = projection.chunk(2)[rank].clone().requires_grad_()
    model = SimpleNamespace(
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"]),
        output_weight=lambda: words,
    )
    total, losses = ModelOutput(leaf, model).cross_entropy(labels, mask, weight)  # type: ignore[arg-type]
    grads = torch.autograd.grad(total, (leaf, words))

    whole = hidden.clone().requires_grad_()
    upstream_words = words.detach().clone().requires_grad_()
    logits = copy_to_tensor_model_parallel_region(whole[mask]) @ upstream_words.T
    upstream = vocab_parallel_cross_entropy(logits, labels[mask])
    upstream_grads = torch.autograd.grad((upstream * weight[mask]).sum(), (whole, upstream_words))
    return {
        "readings": split_readings(leaf, words, model) if sharp == 1 else {},  # probabilities by definition underflow
        "total": total.detach(),
        "losses": losses,
        "hidden": grads[0],
        "words": grads[1],
        "upstream": [upstream.detach(), upstream_grads[0], upstream_grads[1]],
    }


def teacher(sharp: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of both ranks' words, of one rank's alone, and their log-probabilities; [ROWS, SEQ, 4]."""
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(ROWS, SEQ, VOCAB, generator=generator, dtype=torch.float64) * min(sharp, 3.0)
    scores[0, :, VOCAB // 2 :] -= 50
    log_p, ids = scores.log_softmax(-1).topk(4)
    return ids, log_p


def split_readings(leaf: torch.Tensor, words: torch.Tensor, model: Any) -> dict[str, list[torch.Tensor]]:
    """Value and gradients of each of the other readings."""
    from megatron_vpmoe.model.output import CrossEntropy, Divergence, ModelOutput

    _, _, labels, mask, weight = inputs(1.0)
    found = {}
    output, (ids, log_p) = ModelOutput(leaf, model), teacher(1.0)
    log_p_labels, entropy = output.log_probabilities(labels, mask, entropy=True)
    value = (log_p_labels.sin() + entropy * log_p_labels).sum()
    found["log_probabilities"] = [value.detach(), *torch.autograd.grad(value, (leaf, words))]
    for beta, tail, tau in DIVERGENCES:
        kd = Divergence(teacher_ids=ids, teacher_log_p=log_p, weight=weight, beta=beta, tail=tail, temperature=tau)
        value, _ = output.weighted_sum(mask, [CrossEntropy(labels=labels, weight=weight), kd])
        found[f"{beta} {tail} {tau}"] = [value.detach(), *torch.autograd.grad(value, (leaf, words))]
    found["likeliest"] = list(output.likeliest(labels, mask, 4, among=torch.tensor(AMONG)))
    return found


def whole_readings(hidden: torch.Tensor, projection: torch.Tensor) -> dict[str, list[torch.Tensor]]:
    """The same by definition, in one process."""
    from ref import output as reference

    _, _, labels, mask, weight = inputs(1.0)
    ids, log_p = (x[mask] for x in teacher(1.0))
    rows, found = list(reference.logits(hidden[mask], projection)), {}
    log_p_labels = [reference.log_probability(row, int(label)) for row, label in zip(rows, labels[mask], strict=True)]
    entropy = torch.stack([reference.entropy(row) for row in rows])
    of_labels = torch.stack(log_p_labels)
    found["log_probabilities"] = (of_labels.sin() + entropy * of_labels).sum()
    for beta, tail, tau in DIVERGENCES:
        how = {"beta": beta, "tail": tail, "temperature": tau}
        kd = [reference.divergence(row, i, p, **how) for row, i, p in zip(rows, ids, log_p, strict=True)]
        found[f"{beta} {tail} {tau}"] = (weight[mask] * (torch.stack(kd) - of_labels)).sum()
    every = torch.stack(rows).log_softmax(-1)
    of_ids, places = every[:, AMONG].topk(4)
    return {
        name: [value.detach(), *torch.autograd.grad(value, (hidden, projection), retain_graph=True)]
        for name, value in found.items()
    } | {"likeliest": [torch.tensor(AMONG)[places], of_ids.detach(), of_labels.detach().repeat(2)]}  # each rank has all


def test_two_tensor_parallel_ranks(tmp_path: Path) -> None:
    # Logits of a spread of 40 put all probability on one rank's words, to within e^-100.
    cases = [1.0, 40.0]
    both = run_workers(2, all_cases, cases, folder=tmp_path)
    for sharp, *ranks in zip(cases, *both, strict=True):
        hidden, projection, labels, mask, weight = inputs(sharp)
        hidden, projection = hidden.requires_grad_(), projection.requires_grad_()
        losses = functional.cross_entropy((hidden @ projection.T)[mask], labels[mask], reduction="none")
        total = (losses * weight[mask]).sum()
        expected_hidden, expected_words = torch.autograd.grad(total, (hidden, projection))
        for rank, result in enumerate(ranks):
            expected = expected_words.chunk(2)[rank]
            torch.testing.assert_close(result["total"], total.detach(), **EXACT)
            torch.testing.assert_close(result["losses"], losses.detach(), **EXACT)
            torch.testing.assert_close(result["words"], expected, **EXACT)
            theirs = result["upstream"]
            for mine, upstream in zip((losses.detach(), expected_hidden, expected), theirs, strict=True):
                torch.testing.assert_close(upstream.double(), mine, rtol=1e-5, atol=1e-5)  # upstream's is fp32
            torch.testing.assert_close(result["hidden"], expected_hidden, **EXACT)
            for name, mine in result["readings"].items():
                value, by_hidden, by_words = whole_readings(hidden, projection)[name]
                torch.testing.assert_close(mine[0], value, **EXACT, msg=name)
                torch.testing.assert_close(mine[1], by_hidden, **EXACT, msg=name)
                torch.testing.assert_close(mine[2], by_words.chunk(2)[rank], **EXACT, msg=name)
