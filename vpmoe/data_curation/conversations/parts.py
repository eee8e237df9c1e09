"""What an unfinished conversion leaves behind to go on from: parts of its shards, and a state that names the last row.

Every ``rows_per_part`` source rows all shards are cut: their part files move into ``.convert/`` and the state follows.
A conversion that is killed or dropped loses the rows since. Where the cuts fall depends on the row number alone, so the
joined shards are the same bytes whether it was interrupted or not.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_bytes, write_atomically
from vpmoe.data_curation.conversations.store import ShardWriter, StoredConversation, join_shards
from vpmoe.errors import DataError

ROW_GROUPS_PER_PART = 16


@dataclass
class ConversionState:
    """How far a conversion is; ``rows`` counts conversations, ``rejects`` counts reasons.

    Attributes:
        job: hash of source, prompts and number of shards.
        rows_read: source rows behind us.
        rows: conversations written.
        rejects: reason -> rows.
        rejects_bytes: length of ``rejects.jsonl``.
        parts: parts of each shard that are finished.
        cursor: where the source goes on.
    """

    job: str
    rows_read: int = 0
    rows: int = 0
    rejects: Counter[str] = field(default_factory=Counter)
    rejects_bytes: int = 0
    parts: int = 0
    cursor: dict[str, Any] | None = None

    @property
    def rejected(self) -> int:
        """Rows that did not become conversations."""
        return sum(self.rejects.values())


class PartFiles:
    """The parts of all shards under ``<output_dir>/.convert``.

    Raises:
        DataError: the folder holds an unfinished conversion of something else.
    """

    def __init__(self, output_dir: Path, num_shards: int, job: str) -> None:
        self._output_dir, self._num_shards = output_dir, num_shards
        self._folder = output_dir / ".convert"
        self._folder.mkdir(parents=True, exist_ok=True)
        for stale in self._folder.glob(".*.tmp"):
            stale.unlink()
        self.state = self._read(job)
        self._writers: list[ShardWriter] = []

    def add(self, shard: int, conversation: StoredConversation) -> None:
        """Append a conversation to a shard's present part."""
        if not self._writers:
            self._writers = [ShardWriter(self._part(index, self.state.parts)) for index in range(self._num_shards)]
        self._writers[shard].add(conversation)

    def cut(self, cursor: dict[str, Any], rejects_bytes: int) -> None:
        """Finish the present parts and note that everything up to ``cursor`` is safe."""
        for writer in self._writers:
            writer.close()
        self.state.parts += bool(self._writers)
        self._writers = []
        self.state.cursor, self.state.rejects_bytes = cursor, rejects_bytes
        write_atomically(self._folder / "state.json", json_bytes(vars(self.state)))

    def join(self) -> None:
        """Write the shards out of their parts."""
        for shard in range(self._num_shards):
            parts = [self._part(shard, part) for part in range(self.state.parts)]
            join_shards(parts, self._output_dir / f"shard_{shard:02d}.parquet")

    def discard(self) -> None:
        """Throw away what is not yet part of a finished part."""
        for writer in self._writers:
            writer.discard()
        self._writers = []

    def clear(self) -> None:
        """Remove all parts and the state."""
        self.discard()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _part(self, shard: int, part: int) -> Path:
        return self._folder / f"shard_{shard:02d}_part_{part:06d}.parquet"

    def _read(self, job: str) -> ConversionState:
        path = self._folder / "state.json"
        if not path.exists():
            return ConversionState(job)
        found = json.loads(path.read_bytes())
        if found["job"] != job:
            raise DataError(
                "the folder holds an unfinished conversion of another source, prompts or number of shards",
                source=str(path),
                remedy="pass --overwrite to start afresh, or go on with the options it was begun with",
            )
        return ConversionState(**found | {"rejects": Counter(found["rejects"])})
