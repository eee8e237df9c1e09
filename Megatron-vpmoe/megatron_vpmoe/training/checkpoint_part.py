"""Writing torch's distributed checkpoint files: each rank its own, at once or from a copy while training goes on.

Upstream writes through forked helpers and waits on a queue for them: one that is killed (the kernel does it when memory
runs out) is waited for without end, and others outlive a killed trainer. Here a rank plans together with the others,
and what follows is its own: it writes and hashes its file without a collective, in whichever thread.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.utils import _DistWrapper

from megatron_vpmoe.files import file_entry, json_bytes, write_atomically
from megatron_vpmoe.runtime import device, distributed
from megatron_vpmoe.training import torch_dist

device.prepare()
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as upstream  # noqa: E402

_COPIED_AHEAD = 10_000_000
"""Bytes that torch has under way from a GPU while it writes; its own default."""
_REMEDY = "make room, or mend the path; the checkpoints before it stand: --resume"


class Part:
    """What one rank writes of a checkpoint: its tensors, agreed with the other ranks; a collective.

    Args:
        folder: empty, the same on every rank.
        state: a sharded state dict, as for ``dist_checkpointing.save``; used up.
        content: the metadata of the content, kept in ``common.pt``.
        copy: hold a copy in the host's memory (page-locked for a GPU), so that the state may change at once.

    Raises:
        CheckpointError: the ranks' parts do not fit together, or one's memory does not hold a copy; on every rank the
            same.
    """

    def __init__(self, folder: Path, state: dict[str, Any], content: dict[str, Any], *, copy: bool = False) -> None:
        sharded, common = save_preprocess({**state, "content_metadata": content})
        by_key, _, _ = upstream._replace_state_dict_keys_with_sharded_keys(
            cast(Any, sharded), keep_only_main_replica=True
        )
        # Of any further thread torch forgets errors; where it copies ahead it waits for all work of the device.
        self._writer = Writer(str(folder), thread_count=1, per_thread_copy_ahead=0 if copy else _COPIED_AHEAD)
        self._folder = folder
        planner = upstream.MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        wrapper = _DistWrapper(None, dist.is_initialized(), 0)
        self._metadata: Metadata | None = None

        def propose() -> Any:
            planner.set_up_planner(upstream.mcore_to_pyt_state_dict(by_key), is_coordinator=wrapper.is_coordinator)
            self._writer.set_up_storage_writer(wrapper.is_coordinator)
            return self._writer.prepare_local_plan(planner.create_local_plan())

        def agree(plans: list[Any]) -> list[Any]:
            plans, self._metadata = planner.create_global_plan(plans)
            return self._writer.prepare_global_plan(plans)

        try:
            self._plan = planner.finish_plan(wrapper.reduce_scatter("plan", propose, agree))
        except CheckpointException as error:
            torch_dist.refuse(error, "the checkpoint cannot be written", folder, _REMEDY)
        self._common = _serialized(common) if wrapper.is_coordinator else b""
        self._data: Any = distributed.on_every_rank(lambda: self._copied(planner)) if copy else planner

    def _copied(self, planner: Any) -> _Copies:
        try:
            return _Copies(self._plan, planner)
        except (MemoryError, RuntimeError) as error:
            torch_dist.refuse(
                error,
                "the checkpoint cannot be copied before it is written",
                self._folder,
                "save without a copy (--no-async-save), or give each process more memory",
            )

    def write(self) -> Written:
        """Write this rank's file; no collective, and of any thread.

        Raises:
            CheckpointError: it cannot be written; names this rank.
        """
        try:
            results = self._writer.write_data(self._plan, self._data).value()
            self._data = None
            names = sorted({result.storage_data.relative_path for result in results})
            return Written(results, {name: file_entry(self._folder / name) for name in names})
        except Exception as error:  # what torch's serialization and the system raise
            torch_dist.refuse(error, "the checkpoint cannot be written", self._folder, _REMEDY)

    def finish(self, written: Sequence[Written]) -> None:
        """Write what says where all ranks' tensors are, and what upstream's loader wants beside it; of rank 0."""
        assert self._metadata is not None
        self._writer.finish(self._metadata, [each.results for each in written])
        _write_beside(self._folder, self._common)


class Written(NamedTuple):
    """What one rank has written: torch's account of it, and its files' sizes and hashes by name."""

    results: list[Any]
    files: dict[str, dict[str, Any]]


class _Copies:
    """A plan's data apart from what it was planned of; in the place of a planner."""

    def __init__(self, plan: Any, planner: Any) -> None:
        self._data = {item.index: _copied(planner.resolve_data(item)) for item in plan.items}
        device.finish()

    def resolve_data(self, item: Any) -> Any:
        return self._data[item.index]


def _copied(data: Any) -> Any:
    if not isinstance(data, torch.Tensor):  # serialized already
        return data
    copy = torch.empty(data.shape, dtype=data.dtype, pin_memory=data.is_cuda)
    return copy.copy_(data.detach(), non_blocking=True)


def write_common(folder: Path, common: dict[str, Any]) -> None:
    """Write what upstream's loader wants beside torch's files; one process."""
    _write_beside(folder, _serialized(common))


def _write_beside(folder: Path, common: bytes) -> None:
    write_atomically(folder / "common.pt", common)
    write_atomically(folder / "metadata.json", json_bytes(torch_dist.BACKENDS))


def _serialized(common: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    torch.save(common, stream)
    return stream.getvalue()


class Writer(FileSystemWriter):
    """Torch's, which names what the system said of a write that failed; for one thread."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # Of a full disk torch says "unexpected pos 704 vs 598".
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, OSError):
                cause = cause.__context__
            raise (cause or error) from None
