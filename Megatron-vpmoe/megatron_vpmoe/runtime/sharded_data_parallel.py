"""Gradients reduce-scattered and weights all-gathered in place, in slices of whole matrices, experts and rows.

Upstream's data parallelism with another layout of its buffers (`config/slices.py`). Each rank's slice of a bucket holds
whole units, so that an optimizer of whole matrices can own it: its gradient is summed over ranks there alone, while the
backward pass goes on, and after the update everybody gets its weights.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist

from megatron_vpmoe.config.buffers import BUCKET_BYTES
from megatron_vpmoe.config.slices import Bucket, Units, is_divided, plan_buckets, starts
from megatron_vpmoe.runtime import device

device.prepare()
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig  # noqa: E402
from megatron.core.distributed.param_and_grad_buffer import (  # noqa: E402
    BufferType,
    _ParamAndGradBucket,
    _ParamAndGradBucketGroup,
    _ParamAndGradBuffer,
)


@dataclass(frozen=True)
class Piece:
    """``length`` indices of dimension 0 of ``param`` from ``start``; a scalar is one index."""

    param: torch.nn.Parameter
    start: int
    length: int

    @property
    def whole(self) -> bool:
        """Whether the piece is all of its parameter."""
        return self.length == (self.param.shape[0] if self.param.ndim else 1)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """The piece of a tensor shaped like the parameter: a view."""
        return tensor if self.whole else tensor.narrow(0, self.start, self.length)


def units_of(name: str, param: torch.nn.Parameter) -> Units:
    """How the parameter may be divided."""
    alone = getattr(param, "shared_embedding", False)
    if param.ndim > 1 and is_divided(name):
        return Units(param.shape[0], tuple(param.shape[1:]), alone)
    return Units(1, tuple(param.shape), alone)


class _Buffer(_ParamAndGradBuffer):
    """Gradients of parameters of one dtype, and with several ranks the parameters too, laid out by ``plan_buckets``.

    Args:
        ddp_config: upstream's.
        params: with their names, in the order of the forward pass; at least one.
        group: the ranks that hold the same parameters.
    """

    def __init__(  # upstream's would lay them out
        self,
        ddp_config: DistributedDataParallelConfig,
        params: Sequence[tuple[str, torch.nn.Parameter]],
        group: dist.ProcessGroup,
    ) -> None:
        _, first = params[0]
        self.ddp_config, self.data_parallel_group = ddp_config, group
        self.data_parallel_world_size = ranks = group.size()
        self.params, self.param_dtype, self.grad_dtype = [param for _, param in params], first.dtype, torch.float32
        self.gradient_scaling_factor = 1.0
        self.buckets, self.param_to_bucket = [], {}
        target = BUCKET_BYTES[first.device.type] // self.grad_dtype.itemsize
        plan = plan_buckets([units_of(name, param) for name, param in params], ranks, target)
        *begins, self.numel = starts(plan, ranks)
        self.bucket_indices = [(begin, begin + bucket.size) for begin, bucket in zip(begins, plan, strict=True)]
        self.param_data = None
        if ranks > 1:  # before there are gradients: each parameter's own memory is free again then
            self.param_data = torch.zeros(self.numel, dtype=self.param_dtype, device=first.device)
            for begin, bucket in zip(begins, plan, strict=True):
                for index, offset in bucket.places:
                    param = self.params[index]
                    param.data = self._get(param.shape, begin + offset, BufferType.PARAM).copy_(param.data)
        self.grad_data = torch.zeros(self.numel, dtype=self.grad_dtype, device=first.device)
        for number, (begin, bucket) in enumerate(zip(begins, plan, strict=True)):
            self.buckets.append(self._filled(number, begin, bucket))

    def _filled(self, number: int, begin: int, plan: Bucket) -> _ParamAndGradBucket:
        """The bucket, to whose memory the gradients of its parameters now belong."""
        placed = [(self.params[index], begin + offset) for index, offset in plan.places]
        for param, offset in placed:
            param.main_grad = self._get(param.shape, offset, BufferType.GRAD)  # type: ignore[attr-defined]
        elements = sum(param.numel() for param, _ in placed)
        bucket = self._new_bucket([param for param, _ in placed], begin, begin + plan.size, elements, number)
        bucket.param_to_index = {param: (at - begin, at - begin + param.numel()) for param, at in placed}
        bucket.plan = plan  # type: ignore[attr-defined]
        return bucket


class BucketGroup(_ParamAndGradBucketGroup):
    """One bucket and its collectives.

    Args:
        bucket: of a buffer.
        ddp_config: upstream's.
        group: the ranks that hold the same parameters.
    """

    def __init__(
        self, bucket: _ParamAndGradBucket, ddp_config: DistributedDataParallelConfig, group: dist.ProcessGroup
    ) -> None:
        super().__init__([bucket], ddp_config, group, group.size())
        self._bucket, self._group = bucket, group
        self._before: BucketGroup | None = None
        self._after: BucketGroup | None = None
        self._plan: Bucket = bucket.plan  # type: ignore[attr-defined]
        self._grad_work: dist.Work | None = None
        self._weight_work: dist.Work | None = None
        self._sent = False

    def follow(self, before: BucketGroup) -> None:
        """``before`` is sent before this one, on every rank."""
        self._before, before._after = before, self

    @property
    def _own(self) -> slice:
        return slice(*self._plan.cuts[self._group.rank() :][:2])

    @property
    def pieces(self) -> list[Piece]:
        """What of the bucket is this rank's, in the order of memory."""
        own, found = self._own, []
        for param in self._bucket.params_list:
            start, end = self._bucket.param_to_index[param]
            low, high = max(start, own.start), min(end, own.stop)
            if low < high:
                row = (end - start) // (param.shape[0] if param.ndim else 1)
                found.append(Piece(param, (low - start) // row, (high - low) // row))
        return found

    def reset(self) -> None:
        """Make ready for the next step."""
        self.per_param_grad_ready_counts, self.is_last_microbatch, self._sent = {}, True, False

    def register_grad_ready(self, param: torch.nn.Parameter, force_all_reduce: bool | None = False) -> None:
        """The gradient of ``param`` is complete if this is the last micro-batch; the last one of a bucket sends it.

        Buckets are sent in one order, whatever order their gradients come in: ranks differ in it where experts of one
        see no token. That goes for dense ones and experts together: two groups of ranks whose collectives cross could
        wait for each other on a GPU.
        """
        if not self.is_last_microbatch:
            return
        assert param not in self.per_param_grad_ready_counts, "a second gradient would come too late"
        self.per_param_grad_ready_counts[param] = 1
        self._send_if_ready()

    def _send_if_ready(self) -> None:
        is_ready = len(self.per_param_grad_ready_counts) == len(self.params)
        if is_ready and not self._sent and (self._before is None or self._before._sent):
            self.start_grad_sync()
            if self._after is not None:
                self._after._send_if_ready()

    def start_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Begin to sum this rank's slice over the ranks; of a bucket whose slices are unequal, all of it."""
        self._sent = True
        if self._group.size() == 1:
            return
        grads = self._bucket.grad_data
        if self._plan.even:
            self._grad_work = dist.reduce_scatter_single(grads[self._own], grads, group=self._group, async_op=True)
        else:
            self._grad_work = dist.all_reduce(grads, group=self._group, async_op=True)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Wait for that, having begun if that is due yet."""
        if not self._sent:
            self.start_grad_sync()
        if self._grad_work is not None:
            self._grad_work.wait()
            self._grad_work = None

    @torch.no_grad()
    def start_gather(self) -> None:
        """Begin to bring the other ranks' slices of the weights here."""
        weights, own = self._bucket.param_data, self._own
        if weights is None:
            return
        if self._plan.even:  # as bytes: gloo knows fewer dtypes than parameters have
            everything, part = weights.view(torch.uint8), weights[own].view(torch.uint8)
            self._weight_work = dist.all_gather_single(everything, part, group=self._group, async_op=True)
        else:  # the sum of one rank's bits and the others' zeros
            weights[: own.start].zero_()
            weights[own.stop :].zero_()
            self._weight_work = dist.all_reduce(weights.view(torch.int32), group=self._group, async_op=True)

    def finish_gather(self) -> None:
        """Wait for that."""
        if self._weight_work is not None:
            self._weight_work.wait()
            self._weight_work = None


class ShardedDataParallel(DistributedDataParallel):
    """Upstream's with these buffers; a sum over ranks, not a mean. It can be collected.

    Upstream's hooks hang on autograd's nodes and hold it, and it holds the nodes: a cycle through C++, unseen by
    Python's collector. The model, its buffers and its process groups with all their threads would outlive their last
    user.

    ``sharded_buckets`` are all buckets, in the order in which they are sent.

    Args:
        config: of the model.
        module: the model, whose frozen parameters stay as they are.
        overlap_grad_reduce: send a bucket's gradients as soon as they are there, and not after the backward pass.
    """

    def __init__(self, config: Any, module: torch.nn.Module, *, overlap_grad_reduce: bool) -> None:
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=overlap_grad_reduce,
            use_distributed_optimizer=True,
            check_for_nan_in_grad=False,
        )
        trained = {name: param for name, param in module.named_parameters() if param.requires_grad}
        with _hidden(trained.values()):  # upstream finds the groups, and nothing to lay out
            super().__init__(config, ddp_config, module)
        self.params_with_grad = list(trained.values())
        dense = {name: param for name, param in trained.items() if getattr(param, "allreduce", True)}
        experts = {name: param for name, param in trained.items() if name not in dense}
        self.buffers, self.bucket_groups = self._laid_out(dense, self.intra_dp_cp_group)  # type: ignore[assignment]
        self.expert_parallel_buffers, self.expert_parallel_bucket_groups = self._laid_out(
            experts, self.intra_expt_dp_group
        )
        order = {param: place for place, param in enumerate(trained.values())}
        self.sharded_buckets: list[BucketGroup] = sorted(
            [*self.bucket_groups, *self.expert_parallel_bucket_groups],
            key=lambda bucket: -min(order[param] for param in bucket.params),
        )
        for before, after in pairwise(self.sharded_buckets):
            after.follow(before)
        for group in self.sharded_buckets:
            self.param_to_bucket_group |= dict.fromkeys(group.params, group)
        for param in self.params_with_grad:
            param.grad_added_to_main_grad = False  # type: ignore[attr-defined]
            node: Any = param.expand_as(param).grad_fn.next_functions[0][0]  # type: ignore[union-attr]
            node.register_hook(self._make_backward_post_hook(param))
            self.grad_accs.append(node)

    def finish_grad_sync(self, force_all_reduce: bool | None = False) -> None:
        """Wait for every bucket's sum, in the order in which they are sent."""
        for bucket in self.sharded_buckets:
            bucket.finish_grad_sync(force_all_reduce)

    def _laid_out(
        self, params: dict[str, torch.nn.Parameter], group: dist.ProcessGroup
    ) -> tuple[list[_Buffer], list[BucketGroup]]:
        buffers = []
        for dtype in dict.fromkeys(param.dtype for param in params.values()):
            of_dtype = [(name, param) for name, param in params.items() if param.dtype == dtype]
            buffers.append(_Buffer(self.ddp_config, of_dtype, group))
        buckets = [bucket for buffer in buffers for bucket in buffer.buckets]
        return buffers, [BucketGroup(bucket, self.ddp_config, group) for bucket in buckets]

    def _make_backward_post_hook(self, param: torch.nn.Parameter) -> Callable[..., None]:
        reference = weakref.ref(self)

        def hook(*_grads: object) -> None:
            wrapped = reference()
            if wrapped is not None:
                super(ShardedDataParallel, wrapped)._make_backward_post_hook(param)()

        return hook


@contextmanager
def _hidden(params: Iterable[torch.nn.Parameter]) -> Iterator[None]:
    """They ask for no gradient meanwhile."""
    for param in params:
        param.requires_grad_(False)
    try:
        yield
    finally:
        for param in params:
            param.requires_grad_(True)
