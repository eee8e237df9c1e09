"""Rows of any source -> blocks, in one process and one pass.

For sources that are read once from front to back (compressed lines, the hub) and rows whose fate hangs on earlier ones
(duplicates, a token budget). What a row becomes is a :class:`RowEncoder`'s business. Memory: a million tokens, and
what the encoder remembers.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import write_atomically
from vpmoe.data_curation.datasets.build import build_dataset
from vpmoe.data_curation.datasets.chat import ChatDataset
from vpmoe.data_curation.datasets.encode import Block
from vpmoe.data_curation.datasets.plan import shard_name
from vpmoe.data_curation.datasets.text import HealingText
from vpmoe.data_curation.datasets.vocabularies import place_vocabulary, vocabulary_in
from vpmoe.data_curation.rows.source import RowSource
from vpmoe.errors import DataError, RowError, TokenizerError
from vpmoe.progress import Progress
from vpmoe.steps import Work

_BLOCK_TOKENS = 1 << 20
_BLOCK_ROWS = 1024
_EXCERPT_CHARACTERS = 120


RowKind = HealingText | ChatDataset
"""What decides a dataset of rows besides the source and the extent of the pass."""


@dataclass(frozen=True, slots=True)
class Pass:
    """How far the pass goes.

    Attributes:
        shard_tokens: a shard ends with the row that reaches this many tokens; what a restart may have to do again.
        token_budget: the build ends before the row that would exceed this many tokens, all splits together.
    """

    shard_tokens: int = 50_000_000
    token_budget: int | None = None

    def __post_init__(self) -> None:
        for flag, value in (("--shard-tokens", self.shard_tokens), ("--token-budget", self.token_budget)):
            if value is not None and value < 1:
                raise DataError(f"{flag} {value} holds nothing", source="command line", remedy="use at least 1")


def build_sequential(
    source: RowSource, output_dir: Path, kind: RowKind, extent: Pass, *, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Build the dataset in ``output_dir`` from the rows of ``source``; returns its manifest.

    Raises:
        As :func:`build_dataset`.
    """
    return build_dataset(_OfRows(source, kind, extent), output_dir, overwrite=overwrite, quiet=quiet)


class _OfRows:
    """The recipe; see :class:`~vpmoe.data_curation.datasets.build.Recipe`."""

    shards = ()

    def __init__(self, source: RowSource, kind: RowKind, extent: Pass) -> None:
        self._rows, self._kind, self._extent = source, kind, extent
        self.step, self.base = kind.step, kind.base
        self.inputs = tuple(filter(None, (source.path, self.base.compact_map, self.base.tokenizer)))
        self._tokens = 0

    def config(self) -> dict[str, Any]:
        """The options that decide bytes."""
        extent = {"shard_tokens": self._extent.shard_tokens, "token_budget": self._extent.token_budget}
        return {**self._kind.config(), **extent}

    @cached_property
    def _origin(self) -> dict[str, Any]:
        return self._rows.as_manifest()

    def source(self) -> dict[str, Any]:
        """The source with the hash of each file."""
        return self._origin

    def entries(self) -> dict[str, Any]:
        """The kind's."""
        return self._kind.entries()

    def progress(self, done: list[dict[str, Any]], *, quiet: bool) -> Progress:
        """Rows, and what is left by the token budget or by the bytes of the source."""
        rows = sum(record["rows_read"] for record in done)
        return Progress(self._kind.entries()["kind"], None, quiet=quiet, done_before=rows, share=self._share)

    def _share(self) -> float:
        budget = self._tokens / self._extent.token_budget if self._extent.token_budget else 0.0
        return max(budget, self._rows.bytes_read / self._rows.total_bytes if self._rows.total_bytes else 0.0)

    def blocks(self, work: Work, done: list[dict[str, Any]]) -> Generator[Block, None, None]:
        """Blocks of the rows behind those that are done; the encoder's memory goes to ``work.scratch`` by shard."""
        place_vocabulary(work.folder, self.base)
        encoder = self._kind.encoder(vocabulary_in(work.folder, self.base))
        for record in done:
            encoder.restore((work.scratch / f"{record['name']}.state").read_bytes())
        self._tokens = sum(split["tokens"] for record in done for split in record["splits"].values())
        if done and done[-1]["ended"]:
            return
        if done:
            work.say(f"going on behind {sum(record['rows_read'] for record in done):,} rows that are done")
        stream = self._rows.open(encoder.columns, done[-1]["cursor"] if done else None)

        def ended(block: Block, *, last: bool) -> Block:
            write_atomically(work.scratch / f"{block.shard}.state", encoder.take_state())
            block.end = {"ended": last, "cursor": stream.cursor()}
            return block

        number, in_shard, in_block = len(done), 0, 0
        block, budget = Block(shard_name(number)), self._extent.token_budget
        for place, row in stream:
            try:
                if isinstance(row, RowError):
                    raise row
                encoded = encoder.encode(row)
            except (RowError, TokenizerError) as error:
                shown = (error.source or "") if isinstance(row, RowError) else ascii(dict(row))
                block.reject({"row": place}, error, shown[:_EXCERPT_CHARACTERS])
            else:
                if budget is not None and encoded.documents is not None and self._tokens + encoded.tokens > budget:
                    break
                block.add(encoded)
                self._tokens += encoded.tokens
                in_shard += encoded.tokens
                in_block += encoded.tokens
            block.rows_read += 1
            if in_shard >= self._extent.shard_tokens:
                yield ended(block, last=False)
                number, in_shard, in_block = number + 1, 0, 0
                block = Block(shard_name(number))
            elif in_block >= _BLOCK_TOKENS or block.rows_read == _BLOCK_ROWS:
                yield block
                block, in_block = Block(shard_name(number)), 0
        yield ended(block, last=True)
