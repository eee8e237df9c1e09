"""The manifest of conversations: what they come from, and rows, bytes and sha256 of each shard.

Builders read nothing without it, and refuse shards that changed after it was written.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import file_entry, first_damage
from vpmoe.data_curation.conversations.store import (
    SCHEMA_VERSION,
    StoredConversation,
    count_repeated_ids,
    open_shard,
    read_row_group,
)
from vpmoe.data_curation.manifest import CONVERSATIONS, FILE_NAME, read_manifest, write_manifest
from vpmoe.errors import DataError
from vpmoe.steps import RECEIPT, read_receipt

_REMEDY = "convert again (vpmoe data convert), or move the files that do not belong here away"


def conversations_manifest(shards: Sequence[dict[str, Any]], **others: Any) -> dict[str, Any]:
    """A manifest of shards (:func:`shard_entry` of each); others: ``source, prompts, rejects, repeated_ids``."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": CONVERSATIONS,
        "rows": sum(shard["rows"] for shard in shards),
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": list(shards),
        **others,
    }


def shard_entry(path: Path) -> dict[str, Any]:
    """A shard as the manifest lists it."""
    metadata = open_shard(path).metadata
    return {"name": path.name, "rows": metadata.num_rows, "row_groups": metadata.num_row_groups, **file_entry(path)}


def check_or_write_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a folder of conversation shards, held against them; written where there is none.

    Raises:
        DataError: there are no shards, or they are not as the manifest or the receipt says.
    """
    shards = sorted(folder.glob("*.parquet"))
    if not shards:
        raise DataError("there are no conversations (*.parquet)", source=str(folder), remedy="vpmoe data convert")
    if not (folder / FILE_NAME).exists():
        if (folder / RECEIPT).exists():
            raise DataError("the manifest of a finished conversion is gone", source=str(folder), remedy=_REMEDY)
        manifest = _of_foreign_shards(folder, shards)
        write_manifest(folder, manifest)
        return manifest
    manifest = read_manifest(folder, CONVERSATIONS)
    listed = {entry["name"]: entry for entry in manifest["shards"]}
    files = read_receipt(folder)["files"] if (folder / RECEIPT).exists() else listed
    fault = first_damage(folder, files, check_hashes=True)
    if fault is None and (others := [path.name for path in shards if path.name not in listed]):
        fault = f"{', '.join(others)} is no shard of the manifest"
    if fault is not None:
        raise DataError(fault, source=str(folder), remedy=_REMEDY)
    return manifest


def _of_foreign_shards(folder: Path, shards: Sequence[Path]) -> dict[str, Any]:
    """What can be said of shards that another program wrote: their messages are their own."""
    shard = open_shard(shards[0])
    first = next((row for group in range(shard.num_row_groups) for row in read_row_group(shard, group)), None)
    spoken = {m.role: m.content for m in first.messages} if isinstance(first, StoredConversation) else {}
    return conversations_manifest(
        [shard_entry(path) for path in shards],
        source={"name": folder.resolve().name, "hub_id": None, "revision": None, "files": []},
        prompts={"options": None, "system": spoken.get("system"), "developer": spoken.get("developer")},
        rejects={"count": 0, "reasons": {}, "path": None},
        repeated_ids=count_repeated_ids(shards),
    )
