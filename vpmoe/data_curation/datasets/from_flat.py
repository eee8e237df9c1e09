"""A dataset of plain text from flat token files: their documents, cut to rows; a recipe as the others are."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from vpmoe.data_curation.datasets.build import build_dataset
from vpmoe.data_curation.datasets.encode import Block, Encoded
from vpmoe.data_curation.datasets.flat_files import FILES, META_NAME, Flat
from vpmoe.data_curation.datasets.plan import BuildOptions, shard_name
from vpmoe.data_curation.datasets.sequential import Pass
from vpmoe.data_curation.datasets.text import CONVERSATIONS_ALONE, KIND, in_pieces
from vpmoe.data_curation.datasets.vocabularies import place_vocabulary, vocabulary_in
from vpmoe.progress import Progress
from vpmoe.steps import Work

_BLOCK_TOKENS = 1 << 20


def build_from_flat(
    folder: Path, output: Path, base: BuildOptions, *, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Build the dataset in ``output`` from the flat files in ``folder``; returns its manifest.

    Args:
        folder: holds them.
        output: of the dataset.
        base: length and vocabulary; where it names no vocabulary, that whose files came along.
        overwrite: replace a dataset of other files or options.
        quiet: no progress.

    Raises:
        As :func:`build_dataset`; TokenizerError: the vocabulary is not that of the ids.
    """
    flat = Flat(folder)
    if base.tokenizer is None and base.compact_map is None:
        base = replace(base, tokenizer=flat.tokenizer)
    return build_dataset(_OfFlat(flat, base), output, overwrite=overwrite, quiet=quiet)


class _OfFlat:
    """The recipe; see :class:`~vpmoe.data_curation.datasets.build.Recipe`."""

    step = "text_of_flat"
    shards = ()

    def __init__(self, flat: Flat, base: BuildOptions) -> None:
        self._flat, self.base = flat, base
        self.inputs = tuple(filter(None, (flat.folder, base.compact_map, base.tokenizer)))

    def config(self) -> dict[str, Any]:
        """The options that decide bytes."""
        apart = (*CONVERSATIONS_ALONE, "valid_fraction")
        base = {key: value for key, value in self.base.as_manifest().items() if key not in apart}
        return {**base, "kind": KIND, "split_by": "file", "long_documents": "pieces"}

    @cached_property
    def _origin(self) -> dict[str, Any]:
        files = [entry.model_dump(include={"name", "bytes", "sha256"}) for entry in self._flat.meta.files.values()]
        return {"name": self._flat.folder.resolve().name, "hub_id": None, "revision": None, "files": files}

    def source(self) -> dict[str, Any]:
        """The files with their hashes."""
        return self._origin

    def entries(self) -> dict[str, Any]:
        """As of plain text; the split is the file's."""
        rule = ", ".join(f"{name} is {split}" for split, name in FILES.items())
        return {"kind": KIND, "renderer": None, "prompts": None, "split_rule": {"rule": rule}}

    def progress(self, done: list[dict[str, Any]], *, quiet: bool) -> Progress:
        """Documents of both files."""
        total = sum(entry.documents for entry in self._flat.meta.files.values())
        rows = sum(record["rows_read"] for record in done)
        return Progress(KIND, total, unit="documents", quiet=quiet, done_before=rows)

    def blocks(self, work: Work, done: list[dict[str, Any]]) -> Generator[Block, None, None]:
        """Blocks of the documents behind those that are done."""
        place_vocabulary(work.folder, self.base)
        meta, seen = self._flat.meta, sum(record["rows_read"] for record in done)
        meta.require_vocabulary(vocabulary_in(work.folder, self.base), str(self._flat.folder / META_NAME))
        if done and done[-1]["ended"]:
            return
        number, in_shard, in_block = len(done), 0, 0
        block = Block(shard_name(number))
        for split in FILES:
            ids, ends = self._flat.documents(split)
            first, seen = min(seen, len(ends)), max(0, seen - len(ends))
            starts = np.append(0, ends)[:-1]
            for begin, end in zip(starts[first:].tolist(), ends[first:].tolist(), strict=True):
                encoded = self._encoded(split, np.asarray(ids[begin:end]).astype(np.int32))
                block.add(encoded)
                block.rows_read += 1
                in_shard, in_block = in_shard + encoded.tokens, in_block + encoded.tokens
                if in_shard >= Pass().shard_tokens:
                    block.end = {"ended": False}
                    yield block
                    number, in_shard, in_block = number + 1, 0, 0
                    block = Block(shard_name(number))
                elif in_block >= _BLOCK_TOKENS:
                    yield block
                    block, in_block = Block(shard_name(number)), 0
        block.end = {"ended": True}
        yield block

    def _encoded(self, split: str, ids: np.ndarray) -> Encoded:
        """A document, or its pieces; one that is its end alone has nothing to predict."""
        if len(ids) < 2:
            return Encoded(split, None, counted={"empty_documents": 1})
        return in_pieces(split, ids, self.base.seq_len, {})
