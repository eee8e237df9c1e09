"""The work of a build, one part at a time; runs in worker processes or, with one worker, in the builder's own.

Every function here is a pure function of its input files and the plan, so how the parts are spread over processes can
not be seen in the output.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import accumulate
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from megatron_vpmoe.files import file_entry, json_bytes, move_into_place, write_atomically
from vpmoe.data_curation.conversations.store import StoredConversation, open_shard, read_row_group
from vpmoe.data_curation.datasets.folder import COMPACT_MAP_NAME
from vpmoe.data_curation.datasets.plan import (
    SPLITS,
    BuildOptions,
    Part,
    PartStats,
    SplitStats,
    histogram_width,
    split_of,
)
from vpmoe.data_curation.datasets.token_files import TripleWriter, file_names
from vpmoe.data_curation.manifest import check_file
from vpmoe.errors import RowError, TokenizerError
from vpmoe.harmony.choice import make_renderer
from vpmoe.harmony.conversation import check_conversation, excerpt
from vpmoe.harmony.renderer import RenderedConversation, Renderer
from vpmoe.harmony.spans import aligned_to_labels, documents, loss_mask
from vpmoe.harmony.truncation import make_fit
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.interface import Tokenizer
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, O200kHarmony, load_o200k_harmony

_INPUT_REMEDY = (
    "the shard changed after its manifest: convert again, or write the manifest again "
    "(python -m vpmoe.data_curation.harmony.write_synth_harmony_manifest)"
)


@dataclass(frozen=True, slots=True)
class WorkPlan:
    """What a worker needs to know; travels to it once.

    Attributes:
        options: the build's options.
        input_dir, output_dir: the conversations and the dataset.
        scratch: folder for part files; this run's own.
        input_shards: the input manifest's entries.
    """

    options: BuildOptions
    input_dir: Path
    output_dir: Path
    scratch: Path
    input_shards: tuple[dict[str, Any], ...]


class PartBuilder:
    """Does the work of one process; the vocabulary is loaded when first needed."""

    def __init__(self, plan: WorkPlan) -> None:
        self.plan = plan

    @cached_property
    def full(self) -> O200kHarmony:
        """The full vocabulary."""
        return load_o200k_harmony(self.plan.options.tokenizer_model)

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The vocabulary of the dataset; the map of a compact one has to lie in the output folder by now."""
        options = self.plan.options
        if options.compact_map is None and options.compact_vocab_size is None:
            return self.full
        path = self.plan.output_dir / COMPACT_MAP_NAME
        return CompactVocabulary.load(self.full, path, padded_vocab_size=options.padded_vocab_size)

    @cached_property
    def _renderer(self) -> Renderer:
        return make_renderer(self.plan.options.renderer, self.tokenizer, self.plan.options.tokenizer_model)

    @cached_property
    def _fit(self):
        return make_fit(self.tokenizer, self.plan.options.seq_len)

    def check_input(self, shard: int) -> None:
        """Hold an input shard against its manifest; raises :class:`DataError` if it changed."""
        entry = self.plan.input_shards[shard]
        check_file(self.plan.input_dir / entry["name"], entry, remedy=_INPUT_REMEDY)

    def count_ids(self, part: Part) -> tuple[PartStats, np.ndarray, np.ndarray]:
        """How often the part's train rows use each id of the full vocabulary: ``(stats, ids, counts)``."""
        renderer = make_renderer("fast", self.full)
        stats = PartStats()
        used = [np.empty(0, dtype=np.int32)]
        for _, row in self._rows(part):
            stats.rows_read += 1
            try:
                conversation = _checked(row)
                if split_of(conversation.synth_id, self.plan.options.valid_fraction) == "train":
                    used.append(renderer.render(conversation.messages).tokens())
            except (RowError, TokenizerError):
                continue  # encode_part meets the same row again and records it
        counts = np.bincount(np.concatenate(used), minlength=VOCAB_SIZE)
        ids = np.flatnonzero(counts)
        return stats, ids, counts[ids]

    def encode_part(self, part: Part) -> PartStats:
        """Render and fit the part's rows, and write them into a part file for each split that has rows."""
        stats = PartStats()
        self._part_path(part, "").parent.mkdir(parents=True, exist_ok=True)
        kept: dict[str, list[RenderedConversation]] = {split: [] for split in SPLITS}
        for row_number, row in self._rows(part):
            stats.rows_read += 1
            try:
                conversation = _checked(row)
                rendered = self._renderer.render(conversation.messages)
            except (RowError, TokenizerError) as error:
                stats.rejects.append(self._reject(part, row_number, row, error))
                continue
            fitted = self._fit(rendered)
            stats.truncation[fitted.branch] += 1
            stats.truncation["analysis_tokens_cut"] += fitted.analysis_tokens_cut
            stats.truncation["user_tokens_cut"] += fitted.user_tokens_cut
            if fitted.conversation is not None:
                split = split_of(conversation.synth_id, self.plan.options.valid_fraction)
                kept[split].append(fitted.conversation)
        for split in SPLITS:
            if kept[split]:
                stats.splits[split] = self._write_part(part, split, kept[split])
        return stats

    def _write_part(self, part: Part, split: str, conversations: list[RenderedConversation]) -> SplitStats:
        tokens, span, lengths = documents(conversations, self.tokenizer.eod_id)
        with self._part_path(part, split).open("wb") as stream:
            for array in (tokens, aligned_to_labels(span, lengths), lengths):
                np.save(stream, array)
        return SplitStats.of_documents(lengths, span, histogram_width(self.plan.options.seq_len))

    def finish_shard(self, shard: int, stats: PartStats) -> dict[str, Any]:
        """Join the shard's part files in order, move them into place, write the shard's receipt; returns it."""
        name = f"shard_{shard:02d}"
        receipt: dict[str, Any] = {"name": name, "rows_read": stats.rows_read, "splits": {}}
        for split in SPLITS:
            counted = stats.splits[split]
            receipt["splits"][split] = {
                "rows": counted.rows,
                "tokens": counted.tokens,
                "span_tokens": counted.span_tokens,
                "longest": counted.longest,
                "histogram": counted.histogram,
                "files": self._join(shard, name, split) if counted.rows else {},
            }
        receipt["truncation"] = dict(stats.truncation)
        receipt["rejects"] = stats.rejects
        write_atomically(receipt_path(self.plan.output_dir, name), json_bytes(receipt))
        shutil.rmtree(self.plan.scratch / f"shard_{shard:02d}")
        return receipt

    def _join(self, shard: int, name: str, split: str) -> dict[str, Any]:
        joined = self.plan.scratch / f"joined_{name}_{split}"
        joined.mkdir(parents=True, exist_ok=True)
        writer = TripleWriter(joined / name)
        for group in range(self.plan.input_shards[shard]["row_groups"]):
            path = self._part_path(Part(shard, group), split)
            if path.exists():
                with path.open("rb") as stream:
                    tokens, span, lengths = (np.load(stream) for _ in range(3))
                writer.add(tokens, loss_mask(span), span, lengths)
        writer.close()
        entries = {file: file_entry(joined / file) for file in file_names(name)}
        for file in entries:
            move_into_place(joined / file, self.plan.output_dir / split / file)
        shutil.rmtree(joined)
        return entries

    def _part_path(self, part: Part, split: str) -> Path:
        return self.plan.scratch / f"shard_{part.shard:02d}" / f"{part.group:06d}_{split}.npy"

    def _rows(self, part: Part) -> Iterator[tuple[int, StoredConversation | RowError]]:
        shard, starts = self._opened(part.shard)
        return enumerate(read_row_group(shard, part.group), starts[part.group])

    @lru_cache(maxsize=2)  # noqa: B019 -- a process has one builder, and parts come shard by shard
    def _opened(self, shard: int) -> tuple[pq.ParquetFile, list[int]]:
        # Kept open: reading the footer again for every row group would be quadratic in the size of a shard.
        opened = open_shard(self.plan.input_dir / self.plan.input_shards[shard]["name"])
        groups = range(opened.num_row_groups)
        return opened, [0, *accumulate(opened.metadata.row_group(group).num_rows for group in groups)]

    def _reject(
        self, part: Part, row_number: int, row: StoredConversation | RowError, error: RowError | TokenizerError
    ) -> dict[str, Any]:
        return {
            "synth_id": row.synth_id if isinstance(row, StoredConversation) else row.source,
            "shard": self.plan.input_shards[part.shard]["name"],
            "row": row_number,
            "reason": error.reason if isinstance(error, RowError) else "untokenizable",
            "detail": error.what,
            "excerpt": _excerpt(row, error),
        }


def receipt_path(output_dir: Path, shard: str) -> Path:
    """Where a finished shard's receipt lies while the build goes on."""
    return output_dir / ".build" / f"{shard}.json"


def read_receipt(output_dir: Path, shard: str) -> dict[str, Any] | None:
    """The receipt of a shard that an earlier run finished, if its files are still as that run left them."""
    path = receipt_path(output_dir, shard)
    if not path.is_file():
        return None
    receipt = json.loads(path.read_bytes())
    for split, counted in receipt["splits"].items():
        for file, entry in counted["files"].items():
            check_file(output_dir / split / file, entry, remedy="start the build afresh with --overwrite")
    return receipt


def _excerpt(row: StoredConversation | RowError, error: RowError | TokenizerError) -> str:
    if isinstance(row, RowError):
        return row.what
    return error.source or excerpt(str(row.messages[0].content) if row.messages else "")


def _checked(row: StoredConversation | RowError) -> StoredConversation:
    if isinstance(row, RowError):
        raise row
    check_conversation(row.messages)
    return row


_builder: PartBuilder | None = None


def start_worker(plan: WorkPlan) -> None:
    """Initialise a worker process; it ends itself when the builder is gone, even by kill -9."""
    global _builder
    _builder = PartBuilder(plan)
    builder_process = parent_process()
    if builder_process is not None:
        threading.Thread(target=_end_with, args=(builder_process.sentinel,), daemon=True).start()


def run_call(method: str, *arguments: Any) -> Any:
    """Run one of :class:`PartBuilder`'s methods in a worker process."""
    if _builder is None:
        raise RuntimeError("start_worker was not called in this process")
    return getattr(_builder, method)(*arguments)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)
