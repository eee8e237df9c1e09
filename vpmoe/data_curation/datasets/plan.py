"""What a build is: its options, the parts it is cut into, the statistics it adds up."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.files import sha256_of_json
from vpmoe.errors import DataError
from vpmoe.harmony.choice import RENDERERS
from vpmoe.harmony.renderer import installed_harmony_version
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.harmony.truncation import BRANCHES
from vpmoe.tokenizer import rank_file
from vpmoe.tokenizer.hf_directory import HFDirectory

SCHEMA_VERSION = 1
KIND = "harmony_kd"
SPLITS = ("train", "valid")
HISTOGRAM_BINS = 64


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Everything that decides a built dataset; how it is computed (workers) is not part of it.

    Attributes:
        seq_len: longest document in tokens, <|endoftext|> counted.
        valid_fraction: share of conversations in the split ``valid``.
        renderer: ``fast`` or ``official``.
        tokenizer_model: a rank file to use instead of the usual places.
        tokenizer: an HF directory whose vocabulary is used instead of o200k Harmony's; of plain text only.
        compact_vocab_size: count the train split's ids and keep this many ids in all; None: no counting.
        compact_map: use this compact map; None: none is given.
        padded_vocab_size: embedding rows; None lets the vocabulary decide.
        strict: stop when more than ``max_reject_fraction`` of the rows are rejected.
        max_reject_fraction: see ``strict``.
    """

    seq_len: int = 2048
    valid_fraction: float = 0.001
    renderer: str = "fast"
    tokenizer_model: Path | None = None
    tokenizer: Path | None = None
    compact_vocab_size: int | None = None
    compact_map: Path | None = None
    padded_vocab_size: int | None = None
    strict: bool = True
    max_reject_fraction: float = 0.001

    def check(self) -> None:
        """Refuse options that cannot be built, all at once.

        Raises:
            DataError: names each of them.
        """
        faults = []
        if self.seq_len < 16:
            faults.append(f"--seq-len {self.seq_len}: no conversation fits below 16 tokens")
        for name, value in (("valid", self.valid_fraction), ("max-reject", self.max_reject_fraction)):
            if not 0 <= value < 1:
                faults.append(f"--{name}-fraction {value}: must be at least 0 and below 1")
        if self.renderer not in RENDERERS:
            faults.append(f"--renderer {self.renderer}: must be one of {', '.join(RENDERERS)}")
        if self.compact_vocab_size is not None and self.compact_map is not None:
            faults.append("--compact-vocab-size and --compact-map: give one of them")
        if self.tokenizer is not None and (self.compact_map is not None or self.tokenizer_model is not None):
            faults.append("--tokenizer is another vocabulary: give no --compact-map or --tokenizer-model beside it")
        if faults:
            raise DataError(
                "options that cannot be built:\n  " + "\n  ".join(faults), source="command line", remedy="--help"
            )

    def as_manifest(self) -> dict[str, Any]:
        """The options that decide bytes, without any path (files are named by their hashes)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "seq_len": self.seq_len,
            "valid_fraction": self.valid_fraction,
            "renderer": self.renderer,
            "renderer_version": renderer_version(self.renderer),
            "rank_file_sha256": self._vocabulary_sha256(),
            "compact_vocab_size": self.compact_vocab_size,
            "compact_map_sha256": _file_hash(self.compact_map),
            "padded_vocab_size": self.padded_vocab_size,
        }

    def config_hash(self) -> str:
        """sha256 over :meth:`as_manifest`: the strictness may change between a build and its continuation."""
        return sha256_of_json(self.as_manifest())

    def _vocabulary_sha256(self) -> str:
        if self.tokenizer is None:
            return rank_file.SHA256
        return HFDirectory(self.tokenizer).rank_file_sha256


@dataclass(frozen=True, slots=True)
class Part:
    """A unit of work: one row group of one input shard."""

    shard: int
    group: int


@dataclass
class SplitStats:
    """Sums over one split; ``histogram[b]`` counts documents of length in ``[b*w, (b+1)*w)``, w the bin width."""

    rows: int = 0
    tokens: int = 0
    span_tokens: list[int] = field(default_factory=lambda: [0] * len(SPAN_NAMES))
    longest: int = 0
    histogram: list[int] = field(default_factory=lambda: [0] * HISTOGRAM_BINS)

    @classmethod
    def of_documents(cls, lengths: np.ndarray, span: np.ndarray, width: int) -> SplitStats:
        """Statistics of documents of these lengths; ``span`` is that of all their tokens, ``width`` the bin's."""
        return cls(
            rows=len(lengths),
            tokens=len(span),
            span_tokens=np.bincount(span, minlength=len(SPAN_NAMES)).tolist(),
            longest=int(lengths.max()),
            histogram=np.bincount(lengths // width, minlength=HISTOGRAM_BINS).tolist(),
        )

    def add(self, other: SplitStats) -> None:
        """Add another's sums."""
        self.rows += other.rows
        self.tokens += other.tokens
        self.span_tokens = [a + b for a, b in zip(self.span_tokens, other.span_tokens, strict=True)]
        self.longest = max(self.longest, other.longest)
        self.histogram = [a + b for a, b in zip(self.histogram, other.histogram, strict=True)]


@dataclass
class PartStats:
    """What became of the rows of a part, or of everything: adds up."""

    rows_read: int = 0
    splits: dict[str, SplitStats] = field(default_factory=lambda: {split: SplitStats() for split in SPLITS})
    truncation: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(BRANCHES, 0)))
    rejects: list[dict[str, Any]] = field(default_factory=list)

    def add(self, other: PartStats) -> None:
        """Add another's sums and append its rejects."""
        self.rows_read += other.rows_read
        for split, stats in self.splits.items():
            stats.add(other.splits[split])
        self.truncation.update(other.truncation)
        self.rejects.extend(other.rejects)

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        return sum(stats.tokens for stats in self.splits.values())


def histogram_width(seq_len: int) -> int:
    """Tokens in one bin of the length histogram."""
    return -(-(seq_len + 1) // HISTOGRAM_BINS)


def split_of(synth_id: str, valid_fraction: float) -> str:
    """``valid`` iff the first 8 bytes of blake2b of the id, as a big-endian number, are below the fraction of 2^64."""
    position = int.from_bytes(hashlib.blake2b(synth_id.encode(), digest_size=8).digest(), "big")
    return "valid" if position < valid_fraction * 2**64 else "train"


def renderer_version(name: str) -> str:
    """Version of a renderer, known without making one."""
    if name == "official":
        return f"openai-harmony {installed_harmony_version()}"
    from vpmoe.harmony.renderer import FastRenderer

    return FastRenderer.version


def _file_hash(path: Path | None) -> str | None:
    if path is None:
        return None
    if not path.is_file():
        raise DataError(
            f"no compact map at {path}", source="--compact-map", remedy="pass a dataset's compact_vocab.npy"
        )
    return hashlib.sha256(path.read_bytes()).hexdigest()
