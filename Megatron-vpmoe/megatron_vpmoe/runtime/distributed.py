"""Process groups, seeds and orderly teardown."""

from __future__ import annotations

import contextlib
import gc
import os
import pickle
import random
import weakref
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from megatron_vpmoe.errors import ConfigError, VpmoeError, of_the_system
from megatron_vpmoe.runtime.determinism import as_before, repeat_bit_for_bit
from megatron_vpmoe.runtime.device import distributed_backend, has_gpu, prepare

T = TypeVar("T")
_left: list[weakref.ref[dist.ProcessGroup]] = []
"""The groups of the last shutdown. A model that is garbage, in a reference cycle, keeps them and their threads."""


def initialize(
    *,
    seed: int,
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    expert_model_parallel_size: int = 1,
    timeout_minutes: int = 10,
    deterministic: bool = False,
) -> None:
    """Join the processes that torchrun's environment describes (alone where there is none) and seed this rank.

    The same seed on every rank: data-parallel replicas start equal, and expert shards are slices of one drawn stack.
    ``deterministic`` is ``training.deterministic`` (``runtime/determinism.py``), for as long as the groups exist.

    Raises:
        DeviceError: the environment does not allow that.
    """
    if deterministic:
        repeat_bit_for_bit()
    prepare()
    if any(group() is not None for group in _left):
        gc.collect()
    from megatron.core import parallel_state

    if has_gpu():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    else:
        # A distance bias over a long document gives probabilities below 1e-38; computing with them is 3 times slower.
        torch.set_flush_denormal(True)
    if not dist.is_initialized():
        timeout = timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            dist.init_process_group(distributed_backend(), timeout=timeout)
        else:
            store = HashStore()
            dist.init_process_group(distributed_backend(), store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor_model_parallel_size,
        pipeline_model_parallel_size=pipeline_model_parallel_size,
        expert_model_parallel_size=expert_model_parallel_size,
        # An expert is never split: over tensor-parallel ranks it is replicated, and each brings its own tokens.
        expert_tensor_parallel_size=1,
        distributed_timeout_minutes=timeout_minutes,
    )
    seed_rank(seed)


def seed_rank(seed: int) -> None:
    """Seed every generator of this rank, whose process groups exist."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)


def shutdown() -> None:
    """Leave the process groups, and compute with small numbers as before; safe to call twice."""
    from megatron.core import parallel_state

    torch.set_flush_denormal(False)
    as_before()
    _left[:] = map(weakref.ref, dist.distributed_c10d._world.pg_map)
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


@contextlib.contextmanager
def single_process(seed: int) -> Iterator[None]:
    """Process groups of one process, for tools that need the model but no peers."""
    initialize(seed=seed)
    try:
        yield
    finally:
        shutdown()


def rank() -> int:
    """This process's global rank; 0 before any group exists."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Processes of the run; 1 before any group exists."""
    return dist.get_world_size() if dist.is_initialized() else 1


def refuse_old_addresses() -> None:
    """Before a group is joined that torchrun may start again.

    Raises:
        ConfigError: it would keep its store, in which new processes find the addresses of those before them.
    """
    may_restart = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0"
    if may_restart and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        raise ConfigError(
            f"torchrun with --max-restarts {os.environ['TORCHELASTIC_MAX_RESTARTS']} keeps one store for all restarts, "
            "in which the processes of the next one would look for those that have failed",
            source="the environment of torchrun (torch/distributed/elastic/rendezvous/dynamic_rendezvous.py)",
            remedy="export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 for every torchrun of the job, or leave --max-restarts",
        )


def is_restarted_group() -> bool:
    """Whether torchrun has started these processes in place of others that failed; a collective.

    An agent counts the failures of its own processes: those of the others say 0 when they are started again.
    """
    return any(gathered(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"))


def from_rank_0(make: Callable[[], T]) -> T:
    """What ``make`` returns on rank 0 (small, and only it is called there), on every rank; a collective.

    Raises:
        VpmoeError: ``make`` raised it, or met a file that cannot be read or written; on every rank the same.
    """
    box: list[Any] = [*_attempted(make)] if rank() == 0 else [None, None]
    if world_size() > 1:
        dist.broadcast_object_list(box, src=0)
    if isinstance(box[1], VpmoeError):
        raise box[1]
    return cast(T, box[0])


def on_every_rank(make: Callable[[], T]) -> T:
    """What ``make`` returns here, once it has returned on every rank; a collective.

    Raises:
        VpmoeError: ``make`` raised it on a rank; on every rank that of the first one.
    """
    result, failure = _attempted(make)
    if (first := first_failure(failure)) is not None:
        raise first
    return cast(T, result)


def first_failure(failure: BaseException | None) -> BaseException | None:
    """Of what ranks have met the first one's, on every rank; a collective."""
    met = [failure] if world_size() == 1 else gathered(portable(failure))
    return next((each for each in met if each is not None), None)


def gathered(value: T) -> list[T]:
    """What each rank passes, in order, on every rank; a collective. Small objects only."""
    every = [value] * world_size()
    if len(every) > 1:
        dist.all_gather_object(every, value)
    return every


def portable(failure: BaseException | None) -> BaseException | None:
    """``failure``, or where it cannot be sent to other ranks what it says."""
    try:
        pickle.loads(pickle.dumps(failure))
    except Exception:  # whatever the exception's own class does
        return RuntimeError(f"{type(failure).__name__}: {failure}")
    return failure


def _attempted(make: Callable[[], T]) -> tuple[T | None, VpmoeError | None]:
    try:
        return make(), None
    except VpmoeError as error:
        return None, error
    except OSError as error:
        return None, of_the_system(error)


def sum_over_ranks(values: Mapping[str, float]) -> dict[str, float]:
    """Sum each number over the data-parallel ranks, in fp64; every rank passes the same keys in the same order."""
    from megatron_vpmoe.runtime.device import current_device

    packed = torch.tensor(list(values.values()), dtype=torch.float64, device=current_device())
    return dict(zip(values, summed_over_ranks(packed).tolist(), strict=True))


def summed_over_ranks(values: torch.Tensor) -> torch.Tensor:
    """``values``, of the device, after each was summed over the data-parallel ranks in place."""
    from megatron.core import parallel_state

    dist.all_reduce(values, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return values
