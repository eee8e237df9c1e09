"""The output manifest of a build, put together from the shards' receipts; nothing in it depends on machine or time."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import sha256_of_file
from megatron_vpmoe.software import git_state
from vpmoe.data_curation.datasets.plan import (
    HISTOGRAM_BINS,
    KIND,
    SCHEMA_VERSION,
    SPLITS,
    BuildOptions,
    histogram_width,
)
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.from_dataset import TOKENIZER_FOLDER
from vpmoe.tokenizer.hf_directory import HFDirectory
from vpmoe.tokenizer.interface import Tokenizer

_SPLIT_RULE = "valid iff the big-endian first 8 bytes of blake2b(synth_id) are below valid_fraction * 2^64, else train"


def assemble_manifest(
    output_dir: Path, options: BuildOptions, tokenizer: Tokenizer, state: dict[str, str], receipts: list[dict[str, Any]]
) -> dict[str, Any]:
    """The manifest of a dataset whose other files all lie in ``output_dir``.

    Args:
        output_dir: the dataset; the compact map and the pieces are hashed here.
        options: what was built.
        tokenizer: the vocabulary of the ids on disk.
        state: ``config_hash`` and ``input_manifest_sha256``.
        receipts: one a shard, in order.
    """
    truncation: Counter[str] = Counter()
    for receipt in receipts:
        truncation.update(receipt["truncation"])
    reasons = Counter(reject["reason"] for receipt in receipts for reject in receipt["rejects"])
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "seq_length": options.seq_len,
        "tokenizer": _tokenizer_entry(output_dir, tokenizer),
        "splits": {split: _split_entry(split, receipts) for split in SPLITS},
        "input_manifest_sha256": state["input_manifest_sha256"],
        "config": options.as_manifest(),
        "config_hash": state["config_hash"],
        "git": git_state(),
        "renderer": {"name": options.renderer, "version": options.as_manifest()["renderer_version"]},
        "split_rule": {"rule": _SPLIT_RULE, "valid_fraction": options.valid_fraction},
        "truncation": dict(truncation),
        "rejects": {
            "count": sum(reasons.values()),
            "reasons": dict(sorted(reasons.items())),
            "path": "rejects.jsonl",
        },
        "length_histogram": _histogram(options, receipts),
    }


def warn_of_empty_valid(manifest: dict[str, Any]) -> None:
    """Say on stderr that the split ``valid`` got no rows, and with which fraction it would."""
    valid, train = manifest["splits"]["valid"]["rows"], manifest["splits"]["train"]["rows"]
    fraction = manifest["split_rule"]["valid_fraction"]
    if valid or not fraction:
        return
    print(
        f"warning: the split valid is empty: {train} rows at --valid-fraction {fraction} give {train * fraction:.1f} "
        f"on average.\n  The dataset trains, but cannot be evaluated on valid. For about 50 rows build it with "
        f"--valid-fraction {min(0.2, max(0.01, round(50 / train, 2)))} --overwrite.",
        file=sys.stderr,
    )


def _tokenizer_entry(output_dir: Path, tokenizer: Tokenizer) -> dict[str, Any]:
    compact_map = None
    if isinstance(tokenizer, CompactVocabulary):
        compact_map = {"path": "compact_vocab.npy", "sha256": sha256_of_file(output_dir / "compact_vocab.npy")}
    carried = {}
    if isinstance(tokenizer, HFDirectory):
        names = (f"{TOKENIZER_FOLDER}/{file.name}" for file in tokenizer.files)
        carried = {"files": [{"path": name, "sha256": sha256_of_file(output_dir / name)} for name in names]}
    return {
        "name": tokenizer.name,
        "rank_file_sha256": tokenizer.rank_file_sha256,
        "vocab_size": tokenizer.vocab_size,
        "padded_vocab_size": tokenizer.padded_vocab_size,
        "eod_id": tokenizer.eod_id,
        "special_tokens": tokenizer.special_tokens,
        "compact_map": compact_map,
        "pieces": {"path": "token_pieces.txt", "sha256": sha256_of_file(output_dir / "token_pieces.txt")},
        **carried,
    }


def _split_entry(split: str, receipts: list[dict[str, Any]]) -> dict[str, Any]:
    counted = [(receipt["name"], receipt["splits"][split]) for receipt in receipts]
    spans = [sum(column) for column in zip(*(entry["span_tokens"] for _, entry in counted), strict=True)]
    return {
        "rows": sum(entry["rows"] for _, entry in counted),
        "tokens": sum(entry["tokens"] for _, entry in counted),
        "span_tokens": dict(zip(SPAN_NAMES, spans, strict=True)),
        # A shard without rows in this split has no files in it: an empty .bin can not be memory-mapped.
        "shards": [
            {"name": name, "rows": entry["rows"], "tokens": entry["tokens"], "files": entry["files"]}
            for name, entry in counted
            if entry["rows"]
        ],
    }


def _histogram(options: BuildOptions, receipts: list[dict[str, Any]]) -> dict[str, Any]:
    width = histogram_width(options.seq_len)
    result: dict[str, Any] = {"bin_width": width}
    for split in SPLITS:
        entries = [receipt["splits"][split] for receipt in receipts]
        counts = [sum(column) for column in zip(*(entry["histogram"] for entry in entries), strict=True)]
        assert len(counts) == HISTOGRAM_BINS
        result[split] = {"counts": counts, "longest": max(entry["longest"] for entry in entries)}
    return result
