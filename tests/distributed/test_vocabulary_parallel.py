"""With the vocabulary split over two ranks the loss and its gradients are those of one process, and of upstream's."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.nn import functional

from tests.workers import run_workers

ROWS, SEQ, HIDDEN, VOCAB = 2, 12, 7, 22
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

    from megatron_vpmoe.model import cross_entropy
    from megatron_vpmoe.model.gpt import ModelOutput

    rank = parallel_state.get_tensor_model_parallel_rank()
    cross_entropy.CHUNK_BYTES = 5 * 8 * VOCAB // 2  # several chunks, the last one smaller
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
        "total": total.detach(),
        "losses": losses,
        "hidden": grads[0],
        "words": grads[1],
        "upstream": [upstream.detach(), upstream_grads[0], upstream_grads[1]],
    }


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
