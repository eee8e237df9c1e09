"""SYNTH rows -> Harmony conversations in parquet shards, a keyed step that goes on where it was stopped.

Row i goes to shard ``i % num_shards``. A row that cannot become a conversation is listed in ``rejects.jsonl`` with its
id and the reason; nothing is repaired.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TextIO

from megatron_vpmoe.files import file_entry, json_line
from vpmoe import steps
from vpmoe.data_curation.conversations.manifest import conversations_manifest, shard_entry
from vpmoe.data_curation.conversations.parts import Parts
from vpmoe.data_curation.conversations.store import SCHEMA_VERSION, count_repeated_ids
from vpmoe.data_curation.conversations.synth import open_synth, to_conversation
from vpmoe.data_curation.manifest import CONVERSATIONS, read_manifest, write_manifest
from vpmoe.data_curation.reject_limit import RejectLimit
from vpmoe.data_curation.rows.source import RowSource
from vpmoe.errors import DataError, RowError
from vpmoe.harmony.prompts import Prompts
from vpmoe.progress import Progress

REJECTS_NAME = "rejects.jsonl"
DEFAULT_LIMIT = RejectLimit(0.001)
_MOST_SHARDS = 900
"""Each is an open file, of which systems commonly allow a process 1,024."""


def convert(
    source: RowSource,
    output_dir: Path,
    *,
    num_shards: int,
    prompts: Prompts,
    limit: RejectLimit = DEFAULT_LIMIT,
    overwrite: bool = False,
    quiet: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Convert all rows of ``source`` into ``num_shards`` parquet shards with their manifest, which is returned.

    A conversion of the same source and options that was killed, dropped or refused is gone on with; the shards are the
    same bytes either way.

    Raises:
        NotOursError, BusyError: see :func:`vpmoe.steps.run`.
        DataError: the source is empty, cannot be read to its end, or too many of its rows were rejected.
    """
    if not 1 <= num_shards <= _MOST_SHARDS:
        raise DataError(f"{num_shards} shards", source="--num-shards", remedy=f"use 1 to {_MOST_SHARDS}")
    steps.check_place(output_dir)
    step = steps.Step(
        "conversations",
        SCHEMA_VERSION,
        output_dir,
        {"source": source.identity(), "prompts": prompts.as_manifest(), "num_shards": num_shards},
        packages=("pyarrow", "datasets") if source.hub_id else ("pyarrow",),
        inputs=(source.path,) if source.path else (),
    )

    def make(work: steps.Work) -> dict[str, Any]:
        try:
            return _Conversion(work, source, num_shards, prompts, limit).run(quiet)
        except OSError as error:
            safe = work.results.get("read", {}).get("rows_read", 0)
            raise DataError(
                f"the conversion cannot go on: {error.strerror or error}; finished and safe: {safe:,} rows",
                source=str(error.filename or work.folder),
                remedy="make room or mend the path, then give the same command again: it goes on behind them",
            ) from error

    steps.run(step, make, overwrite=overwrite, say=say)
    manifest = read_manifest(output_dir, CONVERSATIONS)
    # Work that was finished without a limit passes no stricter one.
    rejects = manifest["rejects"]
    seen = manifest["rows"] + rejects["count"]
    limit.check(rejects["reasons"], seen, source=str(output_dir / REJECTS_NAME), final=True)
    return manifest


class _Conversion:
    """One conversion at work; ``work.results["read"]`` says how far its finished parts reach."""

    def __init__(
        self, work: steps.Work, source: RowSource, num_shards: int, prompts: Prompts, limit: RejectLimit
    ) -> None:
        self._work, self._source, self._num_shards = work, source, num_shards
        self._prompts, self._limit = prompts, limit
        done = work.results.get("read", {})
        self._rows_read: int = done.get("rows_read", 0)
        self._rejects = Counter[str](done.get("rejects", {}))
        self._rejects_bytes: int = done.get("rejects_bytes", 0)
        self._cursor: dict[str, Any] | None = done.get("cursor")
        self._parts = Parts(work.scratch, num_shards, done.get("parts", 0))

    def run(self, quiet: bool) -> dict[str, Any]:
        """Read what is left, judge the rejects, join the parts; returns the report."""
        path = self._work.folder / REJECTS_NAME
        if "shard_00" not in self._work.results:
            try:
                self._read(path, quiet)
            finally:
                self._parts.discard()
        if self._rejects.total() == self._rows_read:
            raise DataError("no row became a conversation", source=self._source.name, remedy=f"see {path}")
        self._limit.check(self._rejects, self._rows_read, source=str(path), final=True)
        shards = []
        for shard in range(self._num_shards):
            shards.append(self._work.once(f"shard_{shard:02d}", partial(self._join, shard)))
            self._parts.remove(shard)
        paths = [self._work.folder / shard["name"] for shard in shards]
        repeated = self._work.once("repeated_ids", partial(count_repeated_ids, paths))
        rejects = {
            "count": self._rejects.total(),
            "reasons": dict(sorted(self._rejects.items())),
            "path": REJECTS_NAME,
            **file_entry(path),
        }
        origin = {"source": self._source.as_manifest(), "prompts": self._prompts.as_manifest()}
        manifest = conversations_manifest(shards, **origin, rejects=rejects, repeated_ids=repeated)
        others = (write_manifest(self._work.folder, manifest), path)
        listed = {shard["name"]: {"bytes": shard["bytes"], "sha256": shard["sha256"]} for shard in shards}
        return {"rejects": rejects, "files": listed | {file.name: file_entry(file) for file in others}}

    def _read(self, path: Path, quiet: bool) -> None:
        path.touch()
        with path.open("r+") as rejects:
            rejects.truncate(self._rejects_bytes)
            rejects.seek(self._rejects_bytes)
            total = self._source.total_rows()
            with Progress("converting", total, quiet=quiet, done_before=self._rows_read) as progress:
                self._read_rows(rejects, total, progress)

    def _read_rows(self, rejects: TextIO, total: int | None, progress: Progress) -> None:
        stream = open_synth(self._source, self._cursor)
        for place, row in stream:
            try:
                self._parts.add(self._rows_read % self._num_shards, to_conversation(row, self._prompts))
                self._rows_read += 1
            except RowError as error:
                self._rows_read += 1
                self._rejects[error.reason] += 1
                synth_id = None if isinstance(row, RowError) else row.get("synth_id")
                named = {"row": place, "synth_id": None if synth_id is None else str(synth_id)}
                rejects.write(
                    json_line(named | {"reason": error.reason, "detail": error.what, "excerpt": error.source or ""})
                )
                self._limit.check(self._rejects, self._rows_read, source=rejects.name, total=total)
            progress.add(1)
            if self._rows_read % self._parts.rows_per_part == 0:
                self._cut(stream.cursor(), rejects)
        self._cut(stream.cursor(), rejects)

    def _cut(self, cursor: dict[str, Any], rejects: TextIO) -> None:
        """Make everything up to ``cursor`` safe."""
        self._parts.cut()
        rejects.flush()
        os.fsync(rejects.fileno())
        self._work.results["read"] = {
            "rows_read": self._rows_read,
            "rejects": dict(self._rejects),
            "rejects_bytes": rejects.tell(),
            "parts": self._parts.finished,
            "cursor": cursor,
        }
        self._work.save()

    def _join(self, shard: int) -> dict[str, Any]:
        path = self._work.folder / f"shard_{shard:02d}.parquet"
        self._parts.join(shard, path)
        return shard_entry(path)
