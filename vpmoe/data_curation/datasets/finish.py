"""The end of a build: the manifest, put together from the shards' records; nothing in it depends on machine or time."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import file_entry, sha256_of_file, sha256_of_json, write_atomically
from megatron_vpmoe.software import git_state
from vpmoe.data_curation.datasets.plan import SCHEMA_VERSION, SPLITS, BuildOptions, renderer_version
from vpmoe.data_curation.datasets.vocabularies import vocabulary_in
from vpmoe.data_curation.datasets.write import histogram_width
from vpmoe.data_curation.manifest import FILE_NAME, write_manifest
from vpmoe.errors import DataError
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.tokenizer.from_dataset import TOKENIZER_FOLDER
from vpmoe.tokenizer.hf_directory import HFDirectory
from vpmoe.tokenizer.interface import pieces_file_bytes

PIECES_NAME = "token_pieces.txt"
REJECTS_NAME = "rejects.jsonl"
Records = list[dict[str, Any]]


def finish(
    folder: Path,
    options: BuildOptions,
    records: Records,
    config: dict[str, Any],
    source: dict[str, Any],
    entries: dict[str, Any],
) -> dict[str, Any]:
    """Write what a dataset has besides its shards, the manifest last.

    Args:
        folder: holds the shards' files, the vocabulary's and the list of rejects.
        options, config: what was built, and what of it decides bytes.
        records: one of each shard, in order.
        source: what was read.
        entries: of the manifest, of this kind of dataset alone.

    Returns:
        ``files`` (name -> bytes, sha256) and the manifest's ``rows`` and ``tokens`` by split.

    Raises:
        DataError: no row came into the split train.
    """
    for split in SPLITS:
        (folder / split).mkdir(exist_ok=True)
    rejects = sum((Counter(record["rejects"]) for record in records), Counter[str]())
    documents = sum((Counter(record["counted"]) for record in records), Counter[str]())
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": entries["kind"],
        "seq_length": options.seq_len,
        "tokenizer": _tokenizer_entry(folder, options),
        "splits": {split: _split_entry(split, records) for split in SPLITS},
        "input_manifest_sha256": source.get("manifest_sha256") or sha256_of_json(source),
        "config": config,
        "config_hash": sha256_of_json(config),
        "git": git_state(),
        "renderer": {"name": options.renderer, "version": renderer_version(options.renderer)},
        "truncation": dict(sum((Counter(record["truncation"]) for record in records), Counter[str]())),
        "documents": {"rows_read": sum(record["rows_read"] for record in records), **documents},
        "rejects": {
            "count": rejects.total(),
            "reasons": dict(sorted(rejects.items())),
            "path": REJECTS_NAME,
            **file_entry(folder / REJECTS_NAME),
        },
        "length_histogram": _histogram(options, records),
        "source": source,
        **entries,
    }
    _check_splits(folder, manifest, options)
    write_manifest(folder, manifest)
    files = {
        f"{split}/{name}": entry
        for split in SPLITS
        for record in records
        for name, entry in record["splits"][split]["files"].items()
    }
    tokenizer = manifest["tokenizer"]
    named = [file["path"] for file in filter(None, (tokenizer["compact_map"], *tokenizer.get("files", ())))]
    files |= {name: file_entry(folder / name) for name in (*named, PIECES_NAME, REJECTS_NAME, FILE_NAME)}
    totals = {split: {key: entry[key] for key in ("rows", "tokens")} for split, entry in manifest["splits"].items()}
    return {"files": files, "splits": totals}


def summary(folder: Path, manifest: Mapping[str, Any]) -> str:
    """What was built, in a few lines."""
    lines = [f"{folder}: vocabulary {manifest['tokenizer']['name']} of {manifest['tokenizer']['vocab_size']:,} ids"]
    for split, entry in manifest["splits"].items():
        spans = ", ".join(f"{name} {count:,}" for name, count in entry["span_tokens"].items())
        lines.append(f"  {split}: {entry['rows']:,} documents, {entry['tokens']:,} tokens ({spans})")
    for name in ("truncation", "documents"):
        lines.append(f"  {name}: " + ", ".join(f"{key} {number:,}" for key, number in manifest[name].items() if number))
    return "\n".join([*lines, f"  rejected: {manifest['rejects']['count']:,}"])


def _check_splits(folder: Path, manifest: dict[str, Any], options: BuildOptions) -> None:
    """Refuse a dataset without rows to train on, and say on stderr that there are none to evaluate on."""
    train, valid = (manifest["splits"][split]["rows"] for split in SPLITS)
    fraction, told = options.valid_fraction, options.split_field
    asked = f"--valid-fraction {fraction}" if told is None else f"--split-field {told}"
    rows, rejected = manifest["documents"]["rows_read"], manifest["rejects"]["count"]
    if rejected == rows:
        reasons = ", ".join(f"{reason} {count}" for reason, count in manifest["rejects"]["reasons"].items())
        raise DataError(
            f"all {rows} rows were rejected ({reasons})" if rows else "the input holds no rows",
            source=str(folder / REJECTS_NAME),
            remedy="look at the rows named there and mend the source, or name the columns that it has",
        )
    if train == 0:
        raise DataError(
            f"none of the {rows} rows is in the split train ({valid} documents are in valid, {rejected} were rejected)",
            source=f"{asked}, --seq-len {options.seq_len}",
            remedy="use a smaller valid fraction (or rows whose column says train), a larger token budget, or, if the "
            "rows were dropped as too long, a longer --seq-len",
        )
    if told is not None and not valid:
        print(f"warning: the split valid is empty: no row that was kept says so in {told}.", file=sys.stderr)
    elif fraction and not valid:
        print(
            f"warning: the split valid is empty: {train} rows at --valid-fraction {fraction} give "
            f"{train * fraction:.1f} on average.\n  The dataset trains, but cannot be evaluated on valid. For about 50 "
            f"rows build it with --valid-fraction {min(0.2, max(0.01, round(50 / train, 2)))} --overwrite.",
            file=sys.stderr,
        )


def _tokenizer_entry(folder: Path, options: BuildOptions) -> dict[str, Any]:
    tokenizer = vocabulary_in(folder, options)
    write_atomically(folder / PIECES_NAME, pieces_file_bytes(tokenizer))

    def hashed(name: str) -> dict[str, str]:
        return {"path": name, "sha256": sha256_of_file(folder / name)}

    entry = {**tokenizer.entry, "pieces": hashed(PIECES_NAME)}
    if isinstance(tokenizer, HFDirectory):
        entry["files"] = [hashed(f"{TOKENIZER_FOLDER}/{file.name}") for file in tokenizer.files]
    return entry


def _split_entry(split: str, records: Records) -> dict[str, Any]:
    counted = [(record["name"], record["splits"][split]) for record in records]
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


def _histogram(options: BuildOptions, records: Records) -> dict[str, Any]:
    result: dict[str, Any] = {"bin_width": histogram_width(options.seq_len)}
    for split in SPLITS:
        counted = [record["splits"][split] for record in records]
        counts = [sum(column) for column in zip(*(entry["histogram"] for entry in counted), strict=True)]
        result[split] = {"counts": counts, "longest": max(entry["longest"] for entry in counted)}
    return result
