"""What the ranks have of a gradient, put together."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

if TYPE_CHECKING:
    from megatron_vpmoe.runtime.sharded_data_parallel import ShardedDataParallel


def whole_gradients(wrapped: ShardedDataParallel) -> dict[str, torch.Tensor]:
    """Name -> the gradient, of which each data-parallel rank has a slice; a collective."""
    found = {}
    for bucket in wrapped.sharded_buckets:
        own = {piece.param: piece for piece in bucket.pieces}
        for param in bucket.buckets[0].params_list:
            gradient: torch.Tensor = param.main_grad  # type: ignore[attr-defined]
            whole = torch.zeros_like(gradient)
            if param in own:
                own[param].of(whole).copy_(own[param].of(gradient))
            dist.all_reduce(whole, group=bucket.intra_distributed_optimizer_instance_group)
            found[param] = whole
    return {name: found[param] for name, param in wrapped.module.named_parameters() if param in found}
