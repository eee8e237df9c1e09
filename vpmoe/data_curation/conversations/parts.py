"""The parts that shards are made of while rows are read: cut at the same rows whatever came between.

Every ``rows_per_part`` source rows all shards are cut, and what is behind the cut is safe. Where the cuts fall depends
on the row number alone, so the joined shards are the same bytes whether the work was interrupted or not.
"""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vpmoe.files import move_into_place
from vpmoe.data_curation.conversations import store
from vpmoe.data_curation.conversations.store import ShardWriter, StoredConversation, open_shard

ROW_GROUPS_PER_PART = 16


class Parts:
    """The parts of all shards in one folder.

    Args:
        folder: where they lie.
        num_shards: how many shards they are of.
        finished: parts of each shard that are there already.
    """

    def __init__(self, folder: Path, num_shards: int, finished: int) -> None:
        self._folder, self._num_shards, self.finished = folder, num_shards, finished
        self.rows_per_part = num_shards * store.ROW_GROUP_ROWS * ROW_GROUPS_PER_PART
        self._writers: list[ShardWriter] = []

    def add(self, shard: int, conversation: StoredConversation) -> None:
        """Append a conversation to a shard's present part."""
        if not self._writers:
            self._writers = [ShardWriter(self._path(index, self.finished)) for index in range(self._num_shards)]
        self._writers[shard].add(conversation)

    def cut(self) -> None:
        """Finish the present part of each shard, durably."""
        for writer in self._writers:
            writer.close()
        self.finished += bool(self._writers)
        self._writers = []

    def discard(self) -> None:
        """Throw away what is not yet part of a finished part."""
        for writer in self._writers:
            writer.discard()
        self._writers = []

    def join(self, shard: int, path: Path) -> None:
        """Write a shard out of its parts: their row groups, in order."""
        temporary = path.with_name(f".{path.name}.tmp")
        with pq.ParquetWriter(temporary, store.SCHEMA, compression="zstd") as writer:
            for part in (open_shard(self._path(shard, number)) for number in range(self.finished)):
                for group in range(part.num_row_groups):
                    writer.write_table(pa.Table.from_batches(part.batches(group), store.SCHEMA).combine_chunks())
        move_into_place(temporary, path)

    def remove(self, shard: int) -> None:
        """Remove the parts of a shard that is joined."""
        for part in range(self.finished):
            self._path(shard, part).unlink(missing_ok=True)

    def _path(self, shard: int, part: int) -> Path:
        return self._folder / f"shard_{shard:02d}_part_{part:06d}.parquet"
