"""Sharding of the row statistic, and a checkpoint written by two expert-parallel ranks read by one."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_parallel_run import toy_run, train_and_save
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from toy_model import EXPERTS, FFN, HIDDEN, ToyModel, toy_config

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.optim import build_optimizer
from megatron_vpmoe.optim.sharded_state import piece_sharding
from megatron_vpmoe.runtime.sharded_data_parallel import Piece


def row_statistic_sharding(model_param: ShardedTensor | ShardedTensorFactory, row: torch.Tensor, **kw: bool) -> Any:
    """The row statistic of a whole local parameter."""
    piece = Piece(torch.nn.Parameter(torch.zeros(row.shape)), 0, row.shape[0])
    return piece_sharding(model_param, piece, row, "second_moment", **kw)


def test_expert_axis_keeps_its_shards() -> None:
    param = ShardedTensor.from_rank_offsets("w", torch.zeros(2, 3, 5), (0, 1, 4), replica_id=(0, 0, 1))
    row = row_statistic_sharding(param, torch.zeros(2, 3, 1))
    assert isinstance(row, ShardedTensor)
    assert row.key == "optimizer.state.second_moment.w"
    assert (row.global_shape, row.global_offset, row.replica_id) == ((8, 3, 1), (2, 0, 0), (0, 0, 0))


def test_a_prepended_layer_axis_stays() -> None:
    param = ShardedTensor.from_rank_offsets("w", torch.zeros(3, 5), (0, 6, 8), prepend_axis_num=1)
    row = row_statistic_sharding(param, torch.zeros(3, 1))
    assert isinstance(row, ShardedTensor)
    assert (row.global_shape, row.global_offset, row.local_shape) == ((8, 3, 1), (6, 0, 0), (3, 1))


def test_split_columns_keep_one_statistic_a_shard() -> None:
    param = ShardedTensor.from_rank_offsets("w", torch.zeros(3, 5), (1, 1, 2))
    row = row_statistic_sharding(param, torch.zeros(3, 1))
    assert isinstance(row, ShardedTensor)
    assert (row.global_shape, row.global_offset) == ((3, 2), (0, 1))


def test_whole_rows_are_one_statistic_that_every_shard_of_the_columns_has() -> None:
    shards = [ShardedTensor.from_rank_offsets("w", torch.zeros(3, 5), (1, i, 2), replica_id=(0, 0, 3)) for i in (0, 1)]
    rows = [row_statistic_sharding(shard, torch.zeros(3, 1), whole_rows=True) for shard in shards]
    assert [(row.global_shape, row.global_offset) for row in rows] == [((3, 1), (0, 0))] * 2
    assert [row.replica_id for row in rows] == [(0, 0, 0), (0, 1, 0)]


def test_a_piece_lies_at_its_offset_and_has_one_holder() -> None:
    """Experts 3 and 4 of this rank's 4, which begin at 4 of 8."""
    param = ShardedTensor.from_rank_offsets("w", torch.zeros(4, 3, 5), (0, 1, 2), replica_id=(0, 0, 1))
    piece = Piece(torch.nn.Parameter(torch.zeros(4, 3, 5)), 2, 2)
    for name, last in (("momentum_buffer", 5), ("second_moment", 1)):
        placed = piece_sharding(param, piece, torch.zeros(2, 3, last), name)
        assert isinstance(placed, ShardedTensor)
        assert placed.key == f"optimizer.state.{name}.w"
        assert (placed.global_shape, placed.global_offset) == ((8, 3, last), (6, 0, 0))
        assert (placed.local_shape, placed.replica_id) == ((2, 3, last), (0, 0, 0))


def test_a_piece_of_a_factorys_parameter_is_refused() -> None:
    factory = ShardedTensorFactory("w", torch.zeros(4, 5), lambda *_: {}, torch.cat)
    with pytest.raises(CheckpointError, match="stored as several tensors"):
        piece_sharding(
            factory, Piece(torch.nn.Parameter(torch.zeros(4, 5)), 0, 2), torch.zeros(2, 5), "momentum_buffer"
        )


def test_a_factory_builds_the_statistic_by_its_own_rule() -> None:
    def halves(key: str, tensor: torch.Tensor, replica_id: object, flattened_range: object) -> list[ShardedTensor]:
        return [ShardedTensor.from_rank_offsets(key, half, (0, i, 2)) for i, half in enumerate(tensor.chunk(2))]

    factory = ShardedTensorFactory("w", torch.zeros(4, 5), halves, torch.cat)
    row = row_statistic_sharding(factory, torch.zeros(4, 1))
    assert isinstance(row, ShardedTensorFactory)
    assert [shard.global_shape for shard in row.build()] == [(4, 1), (4, 1)]


def test_a_foreign_model_state_is_refused(single_process: None) -> None:
    model, other = ToyModel(), ToyModel()
    optimizer = build_optimizer([model], toy_config())
    with pytest.raises(CheckpointError, match="not in the model's state dict"):
        optimizer.sharded_state_dict(other.sharded_state_dict())


@pytest.mark.slow
def test_two_expert_parallel_ranks_save_and_one_continues(tmp_path: Path, single_process: None) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(train_and_save, (2, port, str(tmp_path)), nprocs=2)

    straight, straight_optimizer = toy_run(0, 1)
    for seed in range(2):
        straight.set_gradients(seed)
        _, grad_norm, _ = straight_optimizer.step()

    torch.manual_seed(8)
    model = ToyModel()
    optimizer = build_optimizer([model], toy_config())
    state = model.sharded_state_dict()
    wanted = {"model": state, "optimizer": optimizer.sharded_state_dict(state, is_loading=True)}
    loaded = dist_checkpointing.load(wanted, str(tmp_path))
    model.load_state_dict(loaded["model"])
    optimizer.load_state_dict(loaded["optimizer"])
    assert loaded["grad_norm"] == pytest.approx(grad_norm, rel=1e-6)

    experts = model.get_parameter("decoder.layers.0.mlp.experts.fc1_weight")
    state = optimizer.chained_optimizers[3].state[experts]
    assert state["momentum_buffer"].shape == (EXPERTS, FFN, HIDDEN)
    for run, run_optimizer in ((straight, straight_optimizer), (model, optimizer)):
        run.set_gradients(2)
        run_optimizer.step()
    for (name, ours), theirs in zip(model.named_parameters(), straight.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4, msg=lambda text, name=name: f"{name}: {text}")
