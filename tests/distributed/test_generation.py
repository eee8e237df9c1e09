"""However prompts, experts or heads are spread over ranks, every rank gets the completions that one process makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.tiny import random_batch, tiny_config
from tests.workers import run_workers

# The second rank has the short answers: it is done long before the first, and with one prompt it has none at all.
LIMITS = (20, 2, 17, 3, 25)
PROMPTS = ([5, 9, 3], [7] * 19, [11], [60, 1, 33, 33, 8, 21], [4, 4])

Told = list[tuple[int, int, list[int], list[float], str | None, list[list[int]]]]


def complete(counts: tuple[int, ...], changes: dict[str, object]) -> tuple[list[Told], torch.Tensor]:
    """Completions of the first so many prompts, by a model whose ranks started from one seed.

    Also the log-probabilities of a batch whose tokens are sent to experts that the routers would not choose.
    """
    from megatron_vpmoe.generation.engine import generate
    from megatron_vpmoe.generation.prompts import Prompt
    from megatron_vpmoe.generation.sampling import SamplingOptions
    from megatron_vpmoe.model.builder import build_model
    from megatron_vpmoe.model.moe.replay import replaying
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.sources.reference import log_p_of_labels

    sizes = {name: value for name, value in changes.items() if name.endswith("model_parallel_size")}
    distributed.initialize(seed=7, **sizes)  # type: ignore[arg-type]
    model = build_model(tiny_config(**changes))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter *= 5
    options = SamplingOptions(25, (1,), temperature=1.0, samples=2)
    prompts = [Prompt(ids, max_new_tokens=limit) for ids, limit in zip(PROMPTS, LIMITS, strict=True)]
    told = []
    for count in counts:
        told.append(generate(model, prompts[:count], options, rows=3, record_routing=True))
    if "expert_model_parallel_size" not in changes:
        whole = generate(model, prompts, options, rows=3, cached=False)
        assert [one.ids for one in whole] == [one.ids for one in told[0]]
    given = [Prompt(ids, given=[[number, 3], [7] * number]) for number, ids in enumerate(PROMPTS, 1)]
    told.append(generate(model, given, SamplingOptions(1, ()), rows=3, record_routing=True))
    batch = random_batch(2, 48, 64, seed=1)
    chosen = torch.rand(2, 48, 3, 8, generator=torch.Generator().manual_seed(4)).topk(2).indices.flatten(2)
    with replaying(model, chosen.to(torch.uint8), batch.document_id):
        replayed = log_p_of_labels(model.eval(), batch)
    distributed.shutdown()
    return [
        [(c.place, c.sample, c.ids, c.untempered, c.finish, np.concatenate(c.routing).tolist()) for c in completions]
        for completions in told
    ], replayed


@pytest.fixture(scope="module")
def alone() -> tuple[list[Told], torch.Tensor]:
    return complete((5, 1), {})


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "alltoall"},
        {"expert_model_parallel_size": 2, "moe_token_dispatcher_type": "allgather"},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "expert_model_parallel_size": 2},
    ],
    ids=lambda changes: " ".join(map(str, changes.values())) or "data",
)
def test_two_ranks(alone: tuple[list[Told], torch.Tensor], tmp_path: Path, changes: dict[str, object]) -> None:
    for told, replayed in run_workers(2, complete, (5, 1), changes, folder=tmp_path):
        torch.testing.assert_close(replayed, alone[1], rtol=1e-3, atol=2e-3)
        for found, expected in zip(told, alone[0], strict=True):
            assert [one[:3] + one[4:] for one in found] == [one[:3] + one[4:] for one in expected]
            for one, other in zip(found, expected, strict=True):
                assert one[3] == pytest.approx(other[3], abs=2e-3)
