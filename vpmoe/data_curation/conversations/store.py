"""The parquet form of Harmony conversations: ``synth_id``, ``language``, messages with role, channel, content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vpmoe.files import move_into_place
from vpmoe.data_curation.rows.parquet import Parquet, strings
from vpmoe.errors import DataError, RowError
from vpmoe.harmony.conversation import Message

SCHEMA_VERSION = 1
ROW_GROUP_ROWS = 1024
_IDS_AT_ONCE = 1 << 24
_MESSAGE = pa.struct([("role", pa.string()), ("channel", pa.string()), ("content", pa.string())])
SCHEMA = pa.schema([("synth_id", pa.string()), ("language", pa.string()), ("messages", pa.list_(_MESSAGE))])


@dataclass(frozen=True, slots=True)
class StoredConversation:
    """One row of a shard."""

    synth_id: str
    language: str | None
    messages: tuple[Message, ...]


class ShardWriter:
    """Writes one parquet shard under a temporary name and gives it its own name when it is whole."""

    def __init__(self, path: Path) -> None:
        self._path, self._temporary = path, path.with_name(f".{path.name}.tmp")
        self._writer = pq.ParquetWriter(self._temporary, SCHEMA, compression="zstd")
        self._waiting: list[StoredConversation] = []
        self.rows = 0

    def add(self, conversation: StoredConversation) -> None:
        """Append a conversation; every 1,024 of them make a row group, the unit of parallel work later."""
        self._waiting.append(conversation)
        self.rows += 1
        if len(self._waiting) == ROW_GROUP_ROWS:
            self._write_group()

    def close(self) -> None:
        """Write what waits and move the shard into place."""
        self._write_group()
        self._writer.close()
        move_into_place(self._temporary, self._path)

    def discard(self) -> None:
        """Throw the unfinished shard away, of which a full disk may let nothing more be written."""
        with suppress(OSError):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)

    def _write_group(self) -> None:
        if not self._waiting:
            return
        offsets, roles, channels, contents = [0], [], [], []
        for conversation in self._waiting:
            for message in conversation.messages:
                roles.append(message.role)
                channels.append(message.channel)
                contents.append(message.content)
            offsets.append(len(roles))
        flat = pa.StructArray.from_arrays(
            [pa.array(column, pa.string()) for column in (roles, channels, contents)], fields=list(_MESSAGE)
        )
        columns = [
            pa.array([c.synth_id for c in self._waiting], pa.string()),
            pa.array([c.language for c in self._waiting], pa.string()),
            pa.ListArray.from_arrays(pa.array(offsets, pa.int32()), flat, type=SCHEMA.field("messages").type),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=SCHEMA), row_group_size=ROW_GROUP_ROWS)
        self._waiting.clear()


def join_shards(parts: Sequence[Path], path: Path) -> None:
    """Write the row groups of ``parts``, in order, into the one shard ``path``."""
    temporary = path.with_name(f".{path.name}.tmp")
    with pq.ParquetWriter(temporary, SCHEMA, compression="zstd") as writer:
        for part in map(open_shard, parts):
            for group in range(part.num_row_groups):
                writer.write_table(pa.Table.from_batches(part.batches(group), SCHEMA).combine_chunks())
    move_into_place(temporary, path)


def open_shard(path: Path) -> Parquet:
    """Open a conversation shard.

    Raises:
        DataError: not parquet, or not of this schema.
    """
    shard = Parquet(path)
    if not shard.schema_arrow.equals(SCHEMA):
        raise DataError(
            f"unexpected columns {shard.schema_arrow.names}",
            source=str(path),
            remedy="write the shards with vpmoe data convert",
        )
    return shard


def read_row_group(shard: Parquet, group: int) -> Iterator[StoredConversation | RowError]:
    """The rows of one row group in order; a row whose bytes are not UTF-8 comes as a :class:`RowError`.

    The columns are read flat (one list of roles, one of channels, one of contents): building a dict per message, as
    pyarrow does for nested rows, costs as much as the tokenizer.

    Raises:
        DataError: the row group is damaged.
    """
    for batch in shard.batches(group):
        ids, languages = (strings(batch.column(name)) for name in ("synth_id", "language"))
        listed = batch.column("messages")
        flat = listed.flatten()
        bounds = [0, *listed.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).cumsum().tolist()]
        roles, channels, contents = (strings(flat.field(name)) for name in ("role", "channel", "content"))
        whole = not any(bytes in map(type, column) for column in (ids, languages, roles, channels, contents))
        messages: list[Any] = list(map(Message, roles, contents, channels)) if whole else []  # pyright: ignore[reportArgumentType]
        for synth_id, language, (begin, end) in zip(ids, languages, pairwise(bounds), strict=True):
            if whole and synth_id:
                yield StoredConversation(synth_id, language, tuple(messages[begin:end]))  # pyright: ignore[reportArgumentType]
            else:
                yield _row(synth_id, language, roles[begin:end], channels[begin:end], contents[begin:end])


def _row(
    synth_id: str | bytes | None, language: str | bytes | None, roles: Sequence, channels: Sequence, contents: Sequence
) -> StoredConversation | RowError:
    values = (synth_id, language, *roles, *channels, *contents)
    if bytes in map(type, values):
        wrong = next(value for value in values if isinstance(value, bytes))
        return RowError("invalid_utf8", f"the stored bytes are not UTF-8: {wrong[:80]!r}", source=repr(synth_id))
    if not synth_id:
        return RowError("missing_field", "synth_id is missing")
    messages = tuple(map(Message, roles, contents, channels))
    return StoredConversation(str(synth_id), language, messages)  # pyright: ignore[reportArgumentType]


def count_repeated_ids(paths: Sequence[Path]) -> int:
    """Conversations of these shards whose ``synth_id`` another before them has, by 8 bytes of blake2b.

    Memory: 128 MiB of hashes and a sorted copy; where there are more, the ids are read in as many turns.
    """
    shards = [open_shard(path) for path in paths]
    turns = sum(shard.metadata.num_rows for shard in shards) // _IDS_AT_ONCE + 1
    repeated = 0
    for turn in range(turns):
        found = [np.empty(0, dtype=np.uint64)]
        for shard in shards:
            for group in range(shard.num_row_groups):
                hashes = _id_hashes(shard, group)
                found.append(hashes[hashes % turns == turn])
        joined = np.concatenate(found)
        repeated += len(joined) - len(np.unique(joined))
    return repeated


def _id_hashes(shard: Parquet, group: int) -> np.ndarray:
    ids = [value for batch in shard.batches(group, ["synth_id"]) for value in strings(batch.column(0)) if value]
    texts = (value if isinstance(value, bytes) else value.encode() for value in ids)
    return np.frombuffer(b"".join(hashlib.blake2b(text, digest_size=8).digest() for text in texts), dtype=np.uint64)
