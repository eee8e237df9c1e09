"""What is to be built: the options that every kind of dataset shares, and which row goes to which split."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import sha256_of_file
from megatron_vpmoe.manifest import LONGEST, MOST_IDS
from vpmoe.data_curation.reject_limit import RejectLimit
from vpmoe.errors import DataError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.renderer import RENDERERS, FastRenderer, installed_harmony_version
from vpmoe.harmony.vocabulary import require_conversations
from vpmoe.tokenizer import rank_file
from vpmoe.tokenizer.hf_directory import HFDirectory

SCHEMA_VERSION = 1
KIND = "harmony_kd"
SPLITS = ("train", "valid")
SPLIT_BY = ("id", "content")


@dataclass(frozen=True, slots=True)
class BuildOptions:
    """Length, split, vocabulary, renderer; how it is computed (workers) is not part of it.

    Attributes:
        seq_len: longest document in tokens, <|endoftext|> counted.
        valid_fraction: share of conversations in the split ``valid``.
        split_by: what decides the split of a conversation: its ``id``, or its ``content``, so that no copy of it under
            another id is in the other split.
        split_field: column of rows that says their split, train or valid; rows of another value are left out. None: the
            fraction decides.
        renderer: ``fast`` or ``official``.
        tokenizer_model: a rank file to use instead of the usual places.
        tokenizer: an HF directory whose vocabulary is used instead of o200k Harmony's; for conversations it has to
            have Harmony's tokens.
        compact_vocab_size: count the train split's ids and keep this many ids in all; None: no counting.
        compact_map: use this compact map; None: none is given.
        padded_vocab_size: embedding rows; None lets the vocabulary decide.
        strict: stop when more than ``max_reject_fraction`` of the rows are rejected.
        max_reject_fraction: see ``strict``.
    """

    seq_len: int = 2048
    valid_fraction: float = 0.001
    split_by: str = "id"
    split_field: str | None = None
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
        if not 16 <= self.seq_len <= LONGEST:
            faults.append(
                f"--seq-len {self.seq_len}: no conversation fits below 16 tokens, none is read above {LONGEST}"
            )
        for name, value in (("valid", self.valid_fraction), ("max-reject", self.max_reject_fraction)):
            if not 0 <= value < 1:
                faults.append(f"--{name}-fraction {value}: must be at least 0 and below 1")
        if self.split_by not in SPLIT_BY:
            faults.append(f"--split-by {self.split_by}: must be one of {', '.join(SPLIT_BY)}")
        if self.renderer not in RENDERERS:
            faults.append(f"--renderer {self.renderer}: must be one of {', '.join(RENDERERS)}")
        if self.compact_vocab_size is not None and self.compact_map is not None:
            faults.append("--compact-vocab-size and --compact-map: give one of them")
        if self.tokenizer is not None and (self.compact_map or self.tokenizer_model or self.compact_vocab_size):
            faults.append(
                "--tokenizer is another vocabulary: give no --compact-map, --compact-vocab-size or --tokenizer-model "
                "beside it"
            )
        if self.tokenizer is not None and self.renderer == "official":
            faults.append("--renderer official: openai_harmony writes o200k's ids, not those of --tokenizer; use fast")
        own = self.tokenizer or self.compact_map or self.compact_vocab_size
        if self.padded_vocab_size is not None and (own is None or self.padded_vocab_size > MOST_IDS):
            what = "o200k Harmony has its own rows" if own is None else f"no vocabulary has more than {MOST_IDS} rows"
            faults.append(f"--padded-vocab-size {self.padded_vocab_size}: {what}")
        if self.compact_map is not None and not self.compact_map.is_file():
            faults.append(f"--compact-map {self.compact_map}: no such file; pass a dataset's compact_vocab.npy")
        if faults:
            raise DataError(
                "options that cannot be built:\n  " + "\n  ".join(faults), source="command line", remedy="--help"
            )

    def check_conversations(self) -> None:
        """Refuse a vocabulary that no conversation can be rendered with; raises :class:`TokenizerError`."""
        if self.tokenizer is not None:
            require_conversations(HFDirectory(self.tokenizer))

    @property
    def reject_limit(self) -> RejectLimit:
        """The limit that the strictness sets; a build may go on under another one."""
        return RejectLimit(self.max_reject_fraction if self.strict else None)

    @property
    def packages(self) -> tuple[str, ...]:
        """Distributions that compute the tokens."""
        return ("numpy", "tokenizers" if self.tokenizer else "tiktoken")

    @property
    def carried_files(self) -> dict[str, str]:
        """Name -> sha256 of the files of an HF tokenizer, which the dataset carries."""
        files = HFDirectory(self.tokenizer).files if self.tokenizer else []
        return {file.name: sha256_of_file(file) for file in files}

    def as_manifest(self) -> dict[str, Any]:
        """The options that decide bytes, without any path (files are named by their hashes)."""
        return {
            "schema_version": SCHEMA_VERSION,
            "seq_len": self.seq_len,
            "valid_fraction": self.valid_fraction,
            "split_by": self.split_by,
            "renderer": self.renderer,
            "renderer_version": renderer_version(self.renderer),
            "rank_file_sha256": HFDirectory(self.tokenizer).rank_file_sha256 if self.tokenizer else rank_file.SHA256,
            "compact_vocab_size": self.compact_vocab_size,
            "compact_map_sha256": sha256_of_file(self.compact_map) if self.compact_map else None,
            "padded_vocab_size": self.padded_vocab_size,
        }

    def split_config(self, id_field: str | None) -> dict[str, str]:
        """What decides the split of rows, for a manifest's ``config``; ``id_field``: the column of their ids."""
        if self.split_field is not None:
            return {"split_by": "field", "split_field": self.split_field}
        return {"split_by": "id" if id_field else "content"}

    def split_rule(self, hashed: str) -> dict[str, Any]:
        """The same in words, for a manifest; ``hashed``: what :func:`split_of` is given where no column says it."""
        if self.split_field is not None:
            return {"rule": f"what the row's {self.split_field} says; rows of other values are left out"}
        rule = (
            f"valid iff the big-endian first 8 bytes of blake2b({hashed}) are below valid_fraction * 2^64, else train"
        )
        return {"rule": rule, "valid_fraction": self.valid_fraction}


def split_of(synth_id: str, valid_fraction: float) -> str:
    """``valid`` iff the first 8 bytes of blake2b of the id, as a big-endian number, are below the fraction of 2^64."""
    position = int.from_bytes(hashlib.blake2b(synth_id.encode(), digest_size=8).digest(), "big")
    return "valid" if position < valid_fraction * 2**64 else "train"


def content_of(messages: Iterable[Message]) -> str:
    """A conversation's roles, channels and texts as JSON: what decides its split where no id does."""
    return json.dumps([[message.role, message.channel, message.content] for message in messages], ensure_ascii=False)


def renderer_version(name: str) -> str:
    """Version of a renderer, known without making one."""
    return f"openai-harmony {installed_harmony_version()}" if name == "official" else FastRenderer.version


def shard_name(number: int) -> str:
    """Name of a dataset's shard; its files' names begin with it."""
    return f"shard_{number:02d}"
