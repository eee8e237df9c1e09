"""Harmony conversations -> the dataset of distillation: one aligned document a conversation.

The unit of work is a row group of an input shard (1,024 conversations). Workers encode row groups, in any number of
processes; the documents come back in their one order and are written by the builder, so the output does not depend on
the number of workers. Memory: the vocabulary and a few row groups for each worker, whatever the size of the input.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import cached_property, lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.conversations.store import StoredConversation, open_shard, read_row_group
from vpmoe.data_curation.datasets.build import build_dataset
from vpmoe.data_curation.datasets.encode import Block, Documents
from vpmoe.data_curation.datasets.plan import KIND, SPLITS, BuildOptions, content_of, shard_name, split_of
from vpmoe.data_curation.datasets.vocabularies import COMPACT_MAP_NAME, place_vocabulary, vocabulary_in
from vpmoe.data_curation.datasets.workers import Crew, make_crew
from vpmoe.data_curation.manifest import CONVERSATIONS, FILE_NAME, check_files, read_manifest
from vpmoe.data_curation.rows.parquet import Parquet
from vpmoe.errors import DataError, RowError, TokenizerError
from vpmoe.harmony.conversation import check_conversation, excerpt
from vpmoe.harmony.renderer import RenderedConversation, Renderer, make_renderer
from vpmoe.harmony.spans import aligned_to_labels, documents, loss_mask
from vpmoe.harmony.truncation import make_fit
from vpmoe.progress import Progress, hashing
from vpmoe.steps import Work
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, load_o200k_harmony

_INPUT_REMEDY = "the shard changed after its manifest: convert again (vpmoe data convert --overwrite)"


class Part(NamedTuple):
    """A unit of work: one row group of one input shard."""

    shard: int
    group: int


def build(
    input_dir: Path,
    output_dir: Path,
    options: BuildOptions,
    *,
    workers: int = 1,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Build the dataset in ``output_dir`` from the conversations in ``input_dir``; returns its manifest.

    Args:
        input_dir: folder with conversation shards and their manifest.
        output_dir: folder to build.
        options: what to build.
        workers: processes that encode; 1 works in this process.
        overwrite: replace a finished dataset of other options or input.
        quiet: no progress.

    Raises:
        As :func:`build_dataset`.
    """
    if workers < 1:
        raise DataError(f"{workers} workers", source="--workers", remedy="use at least 1")
    return build_dataset(Distillation(input_dir, options, workers, quiet), output_dir, overwrite=overwrite, quiet=quiet)


class Distillation:
    """The recipe; see :class:`~vpmoe.data_curation.datasets.build.Recipe`."""

    step = "kd"

    def __init__(self, input_dir: Path, options: BuildOptions, workers: int, quiet: bool) -> None:
        options.check_conversations()
        manifest = read_manifest(input_dir, CONVERSATIONS)
        fields = ("name", "rows", "row_groups", "bytes", "sha256")
        self._shards = [{name: entry[name] for name in fields} for entry in manifest["shards"]]
        self._prompts = {role: manifest["prompts"].get(role) for role in ("system", "developer")}
        self._input_dir, self._workers, self._quiet = input_dir, workers, quiet
        self.base, self.inputs = options, (input_dir, *filter(None, (options.compact_map, options.tokenizer)))
        self.shards = tuple(map(shard_name, range(len(self._shards))))

    def config(self) -> dict[str, Any]:
        """The options that decide bytes."""
        return self.base.as_manifest()

    def source(self) -> dict[str, Any]:
        """The conversations' manifest, which names every shard's hash."""
        return {"manifest_sha256": sha256_of_file(self._input_dir / FILE_NAME)}

    def entries(self) -> dict[str, Any]:
        """Kind, the split's rule, the messages that every conversation begins with."""
        return {
            "kind": KIND,
            "split_rule": self.base.split_rule(
                "synth_id" if self.base.split_by == "id" else "the conversation as JSON"
            ),
            "prompts": self._prompts,
        }

    def progress(self, done: list[dict[str, Any]], *, quiet: bool) -> Progress:
        """Rows of all shards."""
        rows = sum(entry["rows"] for entry in self._shards)
        return Progress("building", rows, quiet=quiet, done_before=sum(record["rows_read"] for record in done))

    def blocks(self, work: Work, done: list[dict[str, Any]]) -> Generator[Block, None, None]:
        """A block of each row group of the shards that are not done."""
        place_vocabulary(work.folder, self.base)
        self._check_input()
        finished = {record["name"] for record in done}
        with make_crew(PartEncoder, (self.base, self._input_dir, work.folder, self._shards), self._workers) as crew:
            if self.base.compact_vocab_size is not None and not (work.folder / COMPACT_MAP_NAME).exists():
                self._count_vocabulary(work.folder, crew)
            waiting = [part for part in self._parts() if shard_name(part.shard) not in finished]
            for part, block in zip(waiting, crew("encode", waiting), strict=True):
                if part.group == self._shards[part.shard]["row_groups"] - 1:
                    block.end = {}
                yield block

    def _check_input(self) -> None:
        """Hold the input's shards against their manifest; raises :class:`DataError` for one that changed."""
        # Threads: a hash is computed outside of the interpreter's lock, and can tell how far it is.
        total, going = sum(entry["bytes"] for entry in self._shards), True
        with hashing("checking the input", total) as tell, ThreadPoolExecutor(self._workers) as pool:

            def told(count: int) -> None:
                if not going:
                    raise CancelledError
                tell(count)

            check = partial(check_files, self._input_dir, remedy=_INPUT_REMEDY, tell=told)
            try:
                list(pool.map(check, ({entry["name"]: entry} for entry in self._shards)))
            finally:
                going = False  # an interrupt waits for no shard

    def _parts(self) -> list[Part]:
        return [Part(shard, group) for shard, entry in enumerate(self._shards) for group in range(entry["row_groups"])]

    def _count_vocabulary(self, folder: Path, crew: Crew) -> None:
        counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
        with Progress("counting ids", sum(entry["rows"] for entry in self._shards), quiet=self._quiet) as progress:
            for rows, ids, found in crew("count_ids", self._parts()):
                counts[ids] += found
                progress.add(rows, int(found.sum()))
        CompactVocabulary.from_counts(
            load_o200k_harmony(self.base.tokenizer_model),
            counts,
            max_size=self.base.compact_vocab_size,
            padded_vocab_size=self.base.padded_vocab_size,
        ).save(folder / COMPACT_MAP_NAME)


class PartEncoder:
    """Does the work of one process, each call a pure function of the input; the vocabulary is loaded when first needed.

    Args:
        options: the build's.
        input_dir: the conversations.
        folder: where the dataset is made; its compact map has to lie there when the first part is encoded.
        shards: the input manifest's entries.
    """

    def __init__(self, options: BuildOptions, input_dir: Path, folder: Path, shards: list[dict[str, Any]]) -> None:
        self._options, self._input_dir, self._folder, self._shards = options, input_dir, folder, shards

    @cached_property
    def _tokenizer(self):
        return vocabulary_in(self._folder, self._options)

    @cached_property
    def _renderer(self) -> Renderer:
        return make_renderer(self._options.renderer, self._tokenizer, self._options.tokenizer_model)

    @cached_property
    def _fit(self):
        return make_fit(self._tokenizer, self._options.seq_len)

    def count_ids(self, part: Part) -> tuple[int, np.ndarray, np.ndarray]:
        """How often the part's train rows use each id of the full vocabulary: ``(rows, ids, counts)``."""
        renderer = make_renderer("fast", load_o200k_harmony(self._options.tokenizer_model))
        rows, used = 0, [np.empty(0, dtype=np.int32)]
        for _, row in self._rows(part):
            rows += 1
            try:
                conversation = _checked(row)
                if self._split_of(conversation) == "train":
                    used.append(renderer.render(conversation.messages).tokens())
            except (RowError, TokenizerError):
                continue  # encode meets the same row again and records it
        counts = np.bincount(np.concatenate(used), minlength=VOCAB_SIZE)
        ids = np.flatnonzero(counts)
        return rows, ids, counts[ids]

    def encode(self, part: Part) -> Block:
        """The part's rows rendered, fitted and labelled."""
        block = Block(shard_name(part.shard))
        renderer, fit = self._renderer, self._fit  # made here: a vocabulary that cannot be loaded is no fault of a row
        kept: dict[str, list[RenderedConversation]] = {split: [] for split in SPLITS}
        for number, row in self._rows(part):
            block.rows_read += 1
            try:
                conversation = _checked(row)
                rendered = renderer.render(conversation.messages)
            except (RowError, TokenizerError) as error:
                synth_id = row.synth_id if isinstance(row, StoredConversation) else row.source
                place = {"synth_id": synth_id, "shard": self._shards[part.shard]["name"], "row": number}
                block.reject(place, error, _excerpt(row, error))
                continue
            fitted = fit(rendered)
            block.truncation[fitted.branch] += 1
            block.truncation["analysis_tokens_cut"] += fitted.analysis_tokens_cut
            block.truncation["user_tokens_cut"] += fitted.user_tokens_cut
            if fitted.conversation is not None:
                kept[self._split_of(conversation)].append(fitted.conversation)
        for split, conversations in kept.items():
            if conversations:
                tokens, span, lengths = documents(conversations, self._tokenizer.eod_id)
                aligned = aligned_to_labels(span, lengths)
                block.parts[split] = [Documents(tokens, loss_mask(aligned), aligned, lengths)]
        return block

    def _split_of(self, conversation: StoredConversation) -> str:
        by_id = self._options.split_by == "id"
        key = conversation.synth_id if by_id else content_of(conversation.messages)
        return split_of(key, self._options.valid_fraction)

    def _rows(self, part: Part) -> Iterator[tuple[int, StoredConversation | RowError]]:
        shard, starts = self._opened(part.shard)
        return enumerate(read_row_group(shard, part.group), starts[part.group])

    @lru_cache(maxsize=2)  # noqa: B019 -- a process has one encoder, and parts come shard by shard
    def _opened(self, shard: int) -> tuple[Parquet, list[int]]:
        # Kept open: reading the footer again for every row group would be quadratic in the size of a shard.
        opened = open_shard(self._input_dir / self._shards[shard]["name"])
        groups = range(opened.num_row_groups)
        return opened, [0, *accumulate(opened.metadata.row_group(group).num_rows for group in groups)]


def _excerpt(row: StoredConversation | RowError, error: RowError | TokenizerError) -> str:
    if isinstance(row, RowError):
        return row.what
    return error.source or excerpt(str(row.messages[0].content) if row.messages else "")


def _checked(row: StoredConversation | RowError) -> StoredConversation:
    if isinstance(row, RowError):
        raise row
    check_conversation(row.messages)
    return row
