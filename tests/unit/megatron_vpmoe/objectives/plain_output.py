"""A model output that is nothing but logits, for the objectives; and what they would ask of a GPU."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.output import ModelOutput
from megatron_vpmoe.objectives import Objective
from megatron_vpmoe.planning.card import CARD, fake_mode, on_paper
from megatron_vpmoe.planning.counting import Counting

VOCAB = 17


def logits_output(logits_BSV: Tensor, dtype: torch.dtype = torch.float32) -> ModelOutput:
    """Hidden states that are the logits, before a projection that changes nothing; process groups must exist."""
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
    model = SimpleNamespace(output_weight=lambda: torch.eye(VOCAB, dtype=dtype), pg_collection=groups)
    return ModelOutput(logits_BSV.to(dtype), model)  # type: ignore[arg-type]


def waits_of(objective: Objective, batch: Batch) -> list[str]:
    """Where the host would wait for a GPU, in the forward pass or the backward one."""
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
    totals = {key: float(value) for key, value in objective.counts([batch]).items()}
    counting = Counting(fake_mode(), batch.tokens.numel(), Tensor.numel)
    with on_paper("NVIDIA H100 80GB HBM3", 80 * 2**30, 1, counting) as on_card:
        weight = on_card(torch.empty(VOCAB, VOCAB))
        model = SimpleNamespace(output_weight=lambda: weight, pg_collection=groups)
        hidden = on_card(torch.empty(*batch.tokens.shape, VOCAB)).requires_grad_()
        objective(ModelOutput(hidden, model), batch.pinned().to(CARD), totals).loss.backward()  # type: ignore[arg-type]
    assert counting.counts.total().flops
    return [site for _, site in counting.counts.syncs]


def logits_for(batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*batch.tokens.shape, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
