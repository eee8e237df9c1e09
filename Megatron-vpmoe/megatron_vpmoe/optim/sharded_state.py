"""How the state of a piece of a parameter goes into a distributed checkpoint and comes back.

In the files every state tensor is one global tensor, placed like its parameter; a piece is a part of it at some offset.
Which rank held which piece is no part of the file. A row statistic, whose last dimension is 1, is placed like its
parameter with the last axis reduced to one entry a shard.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.runtime import device
from megatron_vpmoe.runtime.sharded_data_parallel import Piece

device.prepare()
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory  # noqa: E402
from megatron.core.dist_checkpointing.optimizer import get_param_id_to_sharded_param_map  # noqa: E402

Sharded = ShardedTensor | ShardedTensorFactory
ROW_STATISTIC = "second_moment"


def sharding_of_parameters(
    model_sharded_state_dict: dict[str, Any], params: Sequence[torch.nn.Parameter]
) -> list[Sharded]:
    """The entry of each parameter in the model's sharded state dict.

    Raises:
        CheckpointError: a parameter is not in it.
    """
    found = get_param_id_to_sharded_param_map(model_sharded_state_dict, params) if params else {}
    missing = [tuple(p.shape) for i, p in enumerate(params) if i not in found]
    if missing:
        raise CheckpointError(
            f"{len(missing)} parameters of the optimizer are not in the model's state dict, shapes {missing[:3]}",
            remedy="pass the sharded_state_dict() of the model that the optimizer was built on",
        )
    return [found[i] for i in range(len(params))]


def piece_sharding(
    model_param: Sharded, piece: Piece, tensor: torch.Tensor, name: str, *, whole_rows: bool = False
) -> Sharded:
    """Place the state ``tensor`` of a piece.

    Args:
        model_param: the parameter in the model's sharded state dict. A factory has to take its shapes from the tensor
            it is handed, and its parameter has to be one piece.
        piece: which part of the local parameter.
        tensor: its state, shaped like the piece, or with a last dimension of 1 for the row statistic.
        name: of the state.
        whole_rows: the row statistic is over whole rows although tensor-parallel ranks split the columns, so that all
            of them hold the same.

    Raises:
        CheckpointError: the parameter of a factory, or one with prepended axes, is divided.
    """
    key = f"optimizer.state.{name}.{model_param.key}"
    if not piece.whole and (isinstance(model_param, ShardedTensorFactory) or model_param.prepend_axis_num):
        raise CheckpointError(
            f"{model_param.key} is stored as several tensors or along prepended axes, and data-parallel ranks share it",
            remedy="let it be one unit (config/slices.py)",
        )
    if isinstance(model_param, ShardedTensorFactory):
        return replace(model_param, key=key, data=tensor, replica_id=_only_holder(model_param.replica_id))
    offset, shape = list(model_param.global_offset), list(model_param.global_shape)
    if not piece.whole:
        offset[0] += piece.start
    replica = _only_holder(model_param.replica_id)
    if name == ROW_STATISTIC:
        columns = model_param.local_shape[-1]
        shards, shard = shape[-1] // columns, offset[-1] // columns
        shape[-1], offset[-1] = (1, 0) if whole_rows else (shards, shard)
        if whole_rows and shards > 1:
            replica = (replica[0], shard, replica[2])
    return replace(
        model_param,
        key=key,
        data=tensor,
        dtype=tensor.dtype,
        local_shape=tuple(tensor.shape),
        global_shape=tuple(shape),
        global_offset=tuple(offset),
        # Pieces are of unequal length, so that there is no grid; torch wants one for prepended axes.
        axis_fragmentations=model_param.axis_fragmentations if model_param.prepend_axis_num else None,
        replica_id=replica,
    )


def _only_holder(replica_id: int | tuple[int, ...]) -> tuple[int, ...]:
    """The replica id without its last number, the data-parallel rank: no other rank of that group has the piece."""
    return (0, 0, 0) if isinstance(replica_id, int) else (*replica_id[:-1], 0)
