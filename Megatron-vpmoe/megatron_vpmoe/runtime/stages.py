"""What the stages of a pipeline tell each other outside of Megatron-Core's schedules: metrics, names, new tokens."""

from __future__ import annotations

from typing import TypeVar, cast

import torch
import torch.distributed as dist

T = TypeVar("T")


def from_last_stage(value: T | None) -> T:
    """What the last stage of this pipeline passes, on every stage; other stages pass None. Small objects only."""
    box = [value]
    if _group().size() > 1:
        dist.broadcast_object_list(box, src=_last_rank(), group=_group())
    assert box[0] is not None
    return box[0]


def gather_stages(value: T) -> list[T]:
    """What each stage of this pipeline passes, in order, on every stage. Small objects only."""
    gathered: list[T] = [value] * _group().size()
    if len(gathered) > 1:
        dist.all_gather_object(gathered, value, group=_group())
    return gathered


def tell_stages(tensor: torch.Tensor) -> None:
    """Overwrite ``tensor`` on every stage of this pipeline with the last stage's."""
    if _group().size() > 1:
        dist.broadcast(tensor, src=_last_rank(), group=_group())


def send_to_next_stage(tensor: torch.Tensor) -> None:
    """Send a tensor along this pipeline; blocks until it is on its way."""
    from megatron.core import parallel_state

    dist.send(tensor.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank(), group=_group())


def receive_from_previous_stage(tensor: torch.Tensor) -> None:
    """Fill ``tensor`` with what the stage before sends by ``send_to_next_stage``."""
    from megatron.core import parallel_state

    dist.recv(tensor, parallel_state.get_pipeline_model_parallel_prev_rank(), group=_group())


def _group() -> dist.ProcessGroup:
    from megatron.core import parallel_state

    return cast(dist.ProcessGroup, parallel_state.get_pipeline_model_parallel_group())


def _last_rank() -> int:
    from megatron.core import parallel_state

    return cast(int, parallel_state.get_pipeline_model_parallel_last_rank())
