"""Torch's distributed checkpoint files, read by this process alone, and read as data: no pickle runs.

``checkpoint_part`` writes them. Torch reads ``.metadata`` and stored objects with pickle, which runs what a file
says; here only what torch's own metadata consists of is built from them.
"""

from __future__ import annotations

import functools
import io
import pickle
import re
import warnings
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import metadata as layout
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.files import read_json
from megatron_vpmoe.runtime import device, distributed, pulse

device.prepare()
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.core import CheckpointingException  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedTensor  # noqa: E402
from megatron.core.dist_checkpointing.strategies import torch as upstream  # noqa: E402
from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy  # noqa: E402

# What megatron.core.dist_checkpointing looks for beside torch's files: the backends that wrote the two parts.
BACKENDS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
# What a ``.metadata`` of ours or of upstream's consists of, besides dtypes.
_BUILT = {
    "pathlib": {"PosixPath"},
    "torch": {"Size"},
    "torch.serialization": {"_get_layout"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.distributed.checkpoint.metadata": {*layout.__all__, "_MEM_FORMAT_ENCODING"},
    "torch.distributed.checkpoint.planner": {"SavePlan", "WriteItem", "WriteItemType", "TensorWriteData"},
}
_FILE = re.compile(r"__\d+_\d+\.distcp")
_REMEDY = "restore it from a copy, or name another checkpoint; open only what you, or one whom you trust, have trained"


def read(folder: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Fill a sharded state dict from a checkpoint and add its common part; a collective.

    Raises:
        CheckpointError: a file is damaged, lacks something, or holds what no checkpoint consists of.
    """
    if read_json(folder / "metadata.json", error=CheckpointError, remedy=_REMEDY) != BACKENDS:
        what = f"metadata.json names other formats than {BACKENDS}"
        raise CheckpointError(what, source=str(folder / "metadata.json"), remedy=_REMEDY)
    try:
        return dist_checkpointing.load(state, str(folder), _ReadTensors(), _ReadCommon())  # type: ignore[return-value]
    except (CheckpointException, CheckpointingException) as error:
        refuse(error, "the checkpoint cannot be read", folder, _REMEDY)


def refuse(error: BaseException, what: str, folder: Path, remedy: str) -> NoReturn:
    """Raise ``error``, of torch or the system, as a :class:`CheckpointError` that names the rank which has met it."""
    where, rank = str(folder), distributed.rank()
    if isinstance(error, CheckpointException):
        rank, (cause, _) = min(error.failures.items())
        if isinstance(cause, CheckpointError):
            raise cause from error
        error = cause
    where += f" (rank {rank})" if distributed.world_size() > 1 else ""
    raise CheckpointError(f"{what}: {error}", source=where, remedy=remedy) from error


class Reader(FileSystemReader):
    """Reads a checkpoint's tensors, and its metadata once.

    Args:
        folder: ``iter_NNNNNNN``.

    Raises:
        CheckpointError: by ``metadata``; it cannot be read, or does not say of every tensor where it lies.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(str(folder))
        self.file = folder / ".metadata"

    @functools.cached_property
    def metadata(self) -> layout.Metadata:
        try:
            with self.file.open("rb") as stream:
                metadata = _Unpickler(stream).load()
            reason = _fault(metadata, {path.name: path.stat().st_size for path in self.file.parent.iterdir()})
        except Exception as error:  # a pickle can be wrong in every way that its parts can be
            reason = error.strerror if isinstance(error, OSError) else str(error)
        if reason is not None:
            what = f"not a readable torch_dist checkpoint: {reason}"
            raise CheckpointError(what, source=str(self.file), remedy=_REMEDY)
        return metadata

    def read_metadata(self) -> layout.Metadata:  # type: ignore[override]
        return self.metadata

    def tensors(self) -> dict[str, layout.TensorStorageMetadata]:
        """The stored tensors by key; objects, such as the random state, are left out."""
        entries = self.metadata.state_dict_metadata
        return {key: entry for key, entry in entries.items() if isinstance(entry, layout.TensorStorageMetadata)}

    def tensor(self, key: str) -> torch.Tensor:
        """One stored tensor, whole and on the CPU; needs no process groups."""
        entry = self.tensors()[key]
        target = {key: torch.empty(entry.size, dtype=entry.properties.dtype)}
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message=".*torch.distributed is.*")
                load(target, storage_reader=self, no_dist=True)
        except CheckpointException as error:
            refuse(error, f"{key} cannot be read", self.file.parent, _REMEDY)
        return target[key]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name in _BUILT.get(module, ()) or (module == "torch" and isinstance(getattr(torch, name, 0), torch.dtype)):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint consists of")


def _fault(metadata: Any, sizes: dict[str, int]) -> str | None:
    """What keeps ``metadata`` from being read by: of another shape, or with tensors that lie nowhere or elsewhere.

    ``sizes``: bytes of the files that there are.
    """
    if type(metadata) is not layout.Metadata or not isinstance(metadata.storage_data, dict):
        return "it holds no metadata"
    for index, place in metadata.storage_data.items():
        if not _FILE.fullmatch(place.relative_path) or min(place.offset, place.length) < 0:
            return f"{index.fqn} lies at {place.relative_path!r}, which no save writes"
        if place.offset + place.length > sizes.get(place.relative_path, -1):
            return f"{index.fqn} lies beyond the end of {place.relative_path}"
    for key, entry in metadata.state_dict_metadata.items():
        chunks: list[Any] = [None]
        itemsize = 0
        if isinstance(entry, layout.TensorStorageMetadata):
            chunks = entry.chunks
            inside = all(
                min(begin, size) >= 0 and begin + size <= whole
                for chunk in chunks
                for begin, size, whole in zip(chunk.offsets, chunk.sizes, entry.size, strict=True)
            )
            if not inside or sum(chunk.sizes.numel() for chunk in chunks) != entry.size.numel():
                return f"the parts of {key} are not the whole of it"
            if not isinstance(entry.properties.dtype, torch.dtype):
                return f"{key} has no dtype"
            itemsize = entry.properties.dtype.itemsize
        for chunk in chunks:
            place = metadata.storage_data.get(layout.MetadataIndex(key, chunk and chunk.offsets))
            if place is None:
                return f"{key} lies in no file"
            if chunk and place.length < chunk.sizes.numel() * itemsize:
                return f"{key} has fewer bytes than its shape takes"
    return None


class _Planner(upstream.MCoreLoadPlanner):
    def resolve_tensor(self, read_item: Any) -> torch.Tensor:
        pulse.beat()
        return super().resolve_tensor(read_item)

    def load_bytes(self, read_item: Any, value: io.BytesIO) -> None:
        self.state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


class _ReadTensors(upstream.TorchDistLoadShardedStrategy):
    """Upstream's strategy over :class:`Reader`."""

    def load(self, sharded_state_dict: Any, checkpoint_dir: Any) -> Any:
        by_key, nesting, names = upstream._replace_state_dict_keys_with_sharded_keys(sharded_state_dict)
        tensors = [shard for shards in by_key.values() for shard in shards if isinstance(shard, ShardedTensor)]
        planner = _Planner(
            shapes_validation_sharded_tensors=[shard for shard in tensors if not shard.allow_shape_mismatch],
            allow_shape_mismatch_sharded_tensors={shard.key: shard for shard in tensors if shard.allow_shape_mismatch},
            flatten_state_dict=False,
            flatten_sharded_tensors=False,
        )
        target: dict[str, Any] = upstream.mcore_to_pyt_state_dict(by_key, is_loading=True)  # type: ignore[assignment]
        reader = Reader(Path(checkpoint_dir))
        assert reader.metadata  # of an error inside `load` torch prints a traceback
        load(target, storage_reader=reader, planner=planner)
        local = {key: upstream._unwrap_pyt_sharded_tensor(value) for key, value in target.items()}
        loaded = upstream._replace_sharded_keys_with_state_dict_keys(local, nesting, names)  # type: ignore[arg-type]
        upstream._restore_dict_types(loaded, sharded_state_dict)
        return loaded


class _ReadCommon(TorchCommonLoadStrategy):
    def load_common(self, checkpoint_dir: Any) -> Any:
        path = Path(checkpoint_dir) / "common.pt"
        try:
            common = torch.load(path, map_location="cpu", weights_only=True)
            reason = None if isinstance(common, dict) else f"it holds {type(common).__name__}"
        except Exception as error:  # as above
            common, reason = None, str(error).split("\n")[0]
        if reason is not None:
            raise CheckpointError(f"common.pt cannot be read as data: {reason}", source=str(path), remedy=_REMEDY)
        return common
