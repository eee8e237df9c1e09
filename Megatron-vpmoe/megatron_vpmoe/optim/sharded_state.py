"""How the state of our optimizers goes into a distributed checkpoint and comes back.

Upstream's wrappers expect every state tensor to have its parameter's shape, and number the parameters of a mixed
precision optimizer along the half-precision ones alone, which is wrong as soon as a group also holds fp32 parameters.
Both are settled here: a state tensor whose last dimension is 1 is sharded like its parameter with the last axis reduced
to one entry per shard, and parameters are numbered in the order of the groups.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.runtime import device

device.prepare()
from megatron.core.dist_checkpointing.mapping import (  # noqa: E402
    LocalNonpersistentObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.optimizer import (  # noqa: E402
    get_param_id_to_sharded_param_map,
    make_sharded_optimizer_tensor,
)
from megatron.core.optimizer import (  # noqa: E402
    Float16OptimizerWithFloat16Params,
    FP32Optimizer,
    MegatronOptimizer,
    OptimizerConfig,
)

Sharded = ShardedTensor | ShardedTensorFactory


def row_statistic_sharding(model_param: Sharded, statistic: torch.Tensor, prefix: str) -> Sharded:
    """Shard a state tensor [..., rows, 1] like its parameter [..., rows, columns].

    It is of whole rows: where tensor-parallel ranks split the parameter's columns, all of them hold the same.

    Args:
        model_param: the parameter in the model's sharded state dict. A factory has to take its shapes from the tensor
            it is handed.
        statistic: the local state tensor.
        prefix: what to put before the parameter's key.
    """
    key = f"{prefix}.{model_param.key}"
    if isinstance(model_param, ShardedTensorFactory):
        return replace(model_param, key=key, data=statistic)
    shard = model_param.global_offset[-1] // model_param.local_shape[-1]
    fragmentations, replica = model_param.axis_fragmentations, model_param.replica_id
    if shard and isinstance(replica, tuple):
        replica = (replica[0], shard, *replica[2:])
    return replace(
        model_param,
        key=key,
        data=statistic,
        dtype=statistic.dtype,
        local_shape=tuple(statistic.shape),
        global_shape=(*model_param.global_shape[:-1], 1),
        global_offset=(*model_param.global_offset[:-1], 0),
        axis_fragmentations=None if fragmentations is None else (*fragmentations[:-1], 1),
        replica_id=replica,
    )


class _ShardedState:
    """Mix-in for a MegatronOptimizer: ``sharded_state_dict`` by the rules of this file.

    Parameter groups (learning rates, decays) are not stored: a run's own configuration is the truth about them.
    """

    optimizer: torch.optim.Optimizer
    config: OptimizerConfig
    init_state_fn: Callable[..., None]
    model_params: list[torch.nn.Parameter]
    tp_group: Any

    def sharded_state_dict(
        self, model_sharded_state_dict: dict[str, Any], is_loading: bool = False, metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The state with a sharding for each tensor; missing state is created, so the first step need not have run.

        Args:
            model_sharded_state_dict: of the unwrapped model; its tensors are the parameters themselves.
            is_loading: no difference here: saving and loading ask for the same tensors.
            metadata: no difference here either.

        Raises:
            CheckpointError: a parameter that the model's sharded state dict does not hold.
        """
        self.init_state_fn(self.optimizer, self.config)
        state_dict: dict[str, Any] = self.state_dict()  # type: ignore[attr-defined]
        inner = state_dict.get("optimizer", state_dict)
        sharding = get_param_id_to_sharded_param_map(model_sharded_state_dict, self.model_params)
        missing = [tuple(p.shape) for i, p in enumerate(self.model_params) if i not in sharding]
        if missing:
            raise CheckpointError(
                f"{len(missing)} parameters of the optimizer are not in the model's state dict, shapes {missing[:3]}",
                remedy="pass the sharded_state_dict() of the model that the optimizer was built on",
            )
        step = MegatronOptimizer._extract_common_per_param_step(inner)
        inner["state"] = {
            i: {name: _shard(sharding[i], name, value) for name, value in values.items() if name != "step"}
            for i, values in inner["state"].items()
        }
        if step is not None:
            inner["state"]["common_step"] = step
        if "fp32_from_fp16_params" in state_dict:
            state_dict["fp32_from_fp16_params"] = self._shard_master_weights(sharding)
        inner["param_groups"] = LocalNonpersistentObject(inner["param_groups"])
        return state_dict

    def _shard_master_weights(self, sharding: dict[int, Sharded]) -> list[list[Sharded]]:
        """fp32 copies per group, in the order of the group's half-precision parameters."""
        sharded, index = [], 0
        for group in self.optimizer.param_groups:
            sharded.append([])
            for master in group["params"]:
                if master is not self.model_params[index]:
                    tensor = make_sharded_optimizer_tensor(sharding[index], master, prefix="optimizer.state.fp32_param")
                    sharded[-1].append(tensor)
                index += 1
        return sharded


def _shard(model_param: Sharded, name: str, value: torch.Tensor) -> Sharded:
    prefix = f"optimizer.state.{name}"
    if name == "second_moment":
        return row_statistic_sharding(model_param, value, prefix)
    return make_sharded_optimizer_tensor(model_param, value, prefix=prefix)


class ShardedFP32Optimizer(_ShardedState, FP32Optimizer):
    """Megatron's FP32Optimizer with the state handling of this file."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, init_state_fn: Callable[..., None]):
        self.model_params = [p for group in optimizer.param_groups for p in group["params"]]
        super().__init__(optimizer, config, init_state_fn)


class ShardedFloat16Optimizer(_ShardedState, Float16OptimizerWithFloat16Params):
    """Megatron's mixed-precision optimizer (fp32 masters, no loss scale) with the state handling of this file."""

    def __init__(self, optimizer: torch.optim.Optimizer, config: OptimizerConfig, init_state_fn: Callable[..., None]):
        self.model_params = [p for group in optimizer.param_groups for p in group["params"]]
        super().__init__(optimizer, config, None, init_state_fn)  # pyright: ignore[reportArgumentType]
