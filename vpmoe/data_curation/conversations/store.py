"""The parquet form of Harmony conversations: ``synth_id``, ``language``, messages with role, channel, content."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vpmoe.files import move_into_place
from vpmoe.data_curation.rows.files import Row
from vpmoe.data_curation.rows.parquet import Parquet, rows_of
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

    def add(self, conversation: StoredConversation) -> None:
        """Append a conversation; every 1,024 of them make a row group, the unit of parallel work later."""
        self._waiting.append(conversation)
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
        listed = batch.column("messages")
        flat = listed.flatten()
        bounds = [0, *listed.value_lengths().fill_null(0).to_numpy(zero_copy_only=False).cumsum().tolist()]
        try:
            messages = list(map(Message, *(flat.field(name).to_pylist() for name in ("role", "content", "channel"))))
            ids, languages = (batch.column(name).to_pylist() for name in ("synth_id", "language"))
        except UnicodeDecodeError:
            yield from map(_of_row, rows_of(batch))
            continue
        for synth_id, language, (begin, end) in zip(ids, languages, pairwise(bounds), strict=True):
            yield _stored(synth_id, language, messages[begin:end])


def _of_row(row: Row | RowError) -> StoredConversation | RowError:
    if isinstance(row, RowError):
        return row
    entries = [entry or {} for entry in row["messages"] or ()]
    messages = [Message(*map(entry.get, ("role", "content", "channel"))) for entry in entries]
    return _stored(row["synth_id"], row["language"], messages)


def _stored(synth_id: str | None, language: str | None, messages: list[Message]) -> StoredConversation | RowError:
    if not synth_id:
        return RowError("missing_field", "synth_id is missing")
    return StoredConversation(synth_id, language, tuple(messages))


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
    ids = chain(*(batch.column(0).cast(pa.binary()).to_pylist() for batch in shard.batches(group, ["synth_id"])))
    return np.frombuffer(b"".join(hashlib.blake2b(i, digest_size=8).digest() for i in ids if i), dtype=np.uint64)
