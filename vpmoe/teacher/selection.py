"""Which conversations of a dataset a teacher scores: all, a share, as many as a budget allows, or those of a list."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.files import sha256_of_file
from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.token_files import read_triple
from vpmoe.errors import DataError
from vpmoe.teacher.annotate import Choose


@dataclass(frozen=True)
class Selection:
    """At most one of these; none of them: all conversations.

    Attributes:
        fraction: those whose tokens' hash lies below this share: the same in any order, and a larger share holds them.
        token_budget: from the front of train, then of valid, until one more would exceed so many supervised tokens.
        file: lines of a split and the number of a document in it, as ``vpmoe data inspect`` counts: ``train 17``.
    """

    fraction: float | None = None
    token_budget: int | None = None
    file: Path | None = None

    @property
    def entry(self) -> dict[str, Any]:
        """What decides it, for key and manifest."""
        file = None if self.file is None else sha256_of_file(self.file)
        told = {"fraction": self.fraction, "token_budget": self.token_budget, "file_sha256": file}
        return {name: value for name, value in told.items() if value is not None} or {"all": True}

    def choose(self, manifest: Manifest) -> Choose | None:
        """The rule for a dataset; None: all.

        Raises:
            DataError: more than one is asked for, or the list names what the dataset has not.
        """
        if (self.fraction is not None) + (self.token_budget is not None) + (self.file is not None) > 1:
            raise DataError(
                "more than one rule of which conversations to score",
                source="--fraction, --token-budget, --selection",
                remedy="give one of them",
            )
        if self.fraction is not None:
            below = int(self.fraction * 2**64)
            return lambda split, number, document: _place(document) < below
        if self.token_budget is not None:
            ends = _within(manifest, self.token_budget)
            return lambda split, number, document: number < ends.get(split, 0)
        if self.file is not None:
            listed = _read(self.file, manifest)
            return lambda split, number, document: (split, number) in listed
        return None


def _place(document: Document) -> int:
    content = np.ascontiguousarray(document.tokens, "<i4").tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _within(manifest: Manifest, budget: int) -> dict[str, int]:
    """Documents at the front of each split that have no more supervised tokens than that together."""
    ends = dict.fromkeys(manifest.splits, 0)
    for split, entry in manifest.splits.items():
        for shard in filter(lambda shard: shard.rows, entry.shards):
            for part in read_triple(manifest.root / split, shard.name).parts():
                supervised = np.add.reduceat(part.lossmask, part.starts, dtype=np.int64).cumsum()
                fitting = int(np.searchsorted(supervised, budget, side="right"))
                ends[split] += fitting
                if fitting < part.documents:
                    return ends
                budget -= int(supervised[-1])
    return ends


def _read(file: Path, manifest: Manifest) -> set[tuple[str, int]]:
    listed = set()
    for number, line in enumerate(file.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        split, _, row = line.strip().partition(" ")
        entry = manifest.splits.get(split)
        if line.strip() and (entry is None or not row.isdecimal() or len(row) > 18 or int(row) >= entry.rows):
            raise DataError(
                f"{line[:80]!r} names no document of {manifest.root}",
                source=f"{file}:{number}",
                remedy="write lines such as 'train 17', numbers as vpmoe data inspect shows them",
            )
        if line.strip():
            listed.add((split, int(row)))
    return listed
