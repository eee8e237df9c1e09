"""A model output that is nothing but logits, for the objectives."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.output import ModelOutput

VOCAB = 17


def logits_output(logits_BSV: Tensor, dtype: torch.dtype = torch.float32) -> ModelOutput:
    """Hidden states that are the logits, before a projection that changes nothing; process groups must exist."""
    groups = ProcessGroupCollection.use_mpu_process_groups(required_pgs=["tp"])
    model = SimpleNamespace(output_weight=lambda: torch.eye(VOCAB, dtype=dtype), pg_collection=groups)
    return ModelOutput(logits_BSV.to(dtype), model)  # type: ignore[arg-type]


def logits_for(batch: Batch) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*batch.tokens.shape, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
