"""Re-checking a dataset against its manifest and against itself; every fault is listed, not only the first.

Of token files: hash of each file, lengths of the three signals, ids within the vocabulary, <|endoftext|> at each end,
loss mask and span in agreement, all sums of the manifest; and for a sample of conversations, spans worked out a second
time by the parser. Of conversation shards: hash, rows, and that no file was added.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.checks.kinds import KINDS, check_sample, signal_checks
from vpmoe.data_curation.conversations.store import KIND as CONVERSATIONS_KIND
from vpmoe.data_curation.conversations.store import open_shard
from vpmoe.data_curation.datasets.plan import SPLITS
from vpmoe.data_curation.datasets.token_files import Triple, file_names, read_triple
from vpmoe.data_curation.manifest import FILE_NAME, check_file, read_manifest
from vpmoe.errors import DataError, VpmoeError
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.tokenizer.from_dataset import load_tokenizer
from vpmoe.tokenizer.interface import Tokenizer

_REBUILD = "build the dataset again with --overwrite"
_RECONVERT = "convert again with --overwrite, or write the manifest again if the shards are right"
DEFAULT_PARSED_PER_SHARD = 200


def verify(
    dataset_dir: Path, *, input_dir: Path | None = None, parsed_per_shard: int = DEFAULT_PARSED_PER_SHARD
) -> list[str]:
    """Faults of the dataset in ``dataset_dir``, each naming file, value and remedy; none if it is sound.

    Args:
        dataset_dir: token files or conversation shards; the manifest says which.
        input_dir: the conversations that token files were built from; with it, a changed input is a fault.
        parsed_per_shard: conversations of each shard that are parsed as Harmony.

    Raises:
        DataError: there is no readable manifest, so nothing to check against.
    """
    manifest = read_manifest(dataset_dir)
    if manifest["kind"] == CONVERSATIONS_KIND:
        return [str(fault) for fault in _conversation_faults(dataset_dir, manifest)]
    if manifest["kind"] not in KINDS:
        raise DataError(
            f"no way to verify a dataset of kind {manifest['kind']!r}",
            source=str(dataset_dir / FILE_NAME),
            remedy=f"pass a dataset of kind {CONVERSATIONS_KIND}, {', '.join(KINDS)}",
        )
    faults = list(_input_faults(dataset_dir, manifest, input_dir))
    faults += _named_file_faults(dataset_dir, manifest)
    faults += _token_faults(dataset_dir, manifest, parsed_per_shard)
    return [str(fault) for fault in faults]


def _conversation_faults(folder: Path, manifest: dict[str, Any]) -> Iterator[VpmoeError]:
    for entry in manifest["shards"]:
        path = folder / entry["name"]
        try:
            check_file(path, entry, remedy=_RECONVERT)
            rows = open_shard(path).metadata.num_rows
        except DataError as error:
            yield error
            continue
        if rows != entry["rows"]:
            yield DataError(f"{rows} rows, the manifest says {entry['rows']}", source=str(path), remedy=_RECONVERT)
    listed = {entry["name"] for entry in manifest["shards"]}
    for path in sorted(folder.glob("*.parquet")):
        if path.name not in listed:
            yield DataError("a shard that the manifest does not list", source=str(path), remedy=_RECONVERT)


def _input_faults(folder: Path, manifest: dict[str, Any], input_dir: Path | None) -> Iterator[VpmoeError]:
    if input_dir is None:
        return
    path = input_dir / FILE_NAME
    if not path.is_file():
        yield DataError("the input has no manifest", source=str(path), remedy="pass the folder it was built from")
    elif (found := sha256_of_file(path)) != manifest["input_manifest_sha256"]:
        yield DataError(
            f"the input's manifest has sha256 {found}, the dataset was built from {manifest['input_manifest_sha256']}",
            source=str(folder / FILE_NAME) + ": input_manifest_sha256",
            remedy=_REBUILD,
        )


def _named_file_faults(folder: Path, manifest: dict[str, Any]) -> Iterator[VpmoeError]:
    entry = manifest["tokenizer"]
    for named in filter(None, (entry["pieces"], entry["compact_map"], *entry.get("files", ()))):
        path = folder / named["path"]
        if not path.is_file():
            yield DataError("a file of the manifest is missing", source=str(path), remedy=_REBUILD)
        elif (found := sha256_of_file(path)) != named["sha256"]:
            yield DataError(
                f"sha256 is {found}, the manifest says {named['sha256']}", source=str(path), remedy=_REBUILD
            )
    path = folder / manifest["rejects"]["path"]
    rejects = len(path.read_bytes().splitlines()) if path.is_file() else None
    if rejects != manifest["rejects"]["count"]:
        yield DataError(
            f"{rejects} rejects are listed, the manifest says {manifest['rejects']['count']}",
            source=str(path),
            remedy=_REBUILD,
        )
    for split in SPLITS:
        listed = {name for shard in manifest["splits"][split]["shards"] for name in shard["files"]}
        for path in sorted((folder / split).glob("*")):
            if path.name not in listed:
                yield DataError("a file that the manifest does not list", source=str(path), remedy=_REBUILD)


def _token_faults(folder: Path, manifest: dict[str, Any], parsed: int) -> Iterator[VpmoeError]:
    tokenizer: Tokenizer | None = None
    try:
        tokenizer = load_tokenizer(folder)
    except VpmoeError as error:
        yield error
    for split, entry in manifest["splits"].items():
        sums: list[np.ndarray] = []
        for shard in entry["shards"]:
            where = f"{split}/{shard['name']}"
            try:
                triple = _checked_files(folder / split, shard, where)
                sums.append(_check_triple(triple, manifest, shard, where))
                if tokenizer is not None:
                    check_sample(triple, tokenizer, manifest, parsed, where)
            except VpmoeError as error:
                yield error
        said = [entry["rows"], entry["tokens"], *(entry["span_tokens"][name] for name in SPAN_NAMES)]
        # Sums over the sound shards only would repeat the fault of the others.
        if len(sums) == len(entry["shards"]) and sum(sums, np.zeros(len(said), dtype=np.int64)).tolist() != said:
            yield DataError(
                f"rows, tokens and span tokens of the shards do not add up to {said}",
                source=f"{FILE_NAME}: splits.{split}",
                remedy=_REBUILD,
            )


def _checked_files(folder: Path, shard: dict[str, Any], where: str) -> Triple:
    if sorted(shard["files"]) != sorted(file_names(shard["name"])):
        raise DataError(f"the manifest lists the files {', '.join(shard['files'])}", source=where, remedy=_REBUILD)
    for name, file in shard["files"].items():
        check_file(folder / name, file, remedy=_REBUILD)
    return read_triple(folder, shard["name"])


def _check_triple(triple: Triple, manifest: dict[str, Any], shard: dict[str, Any], where: str) -> np.ndarray:
    """Rows, tokens and tokens of each span; raises :class:`DataError` for signals that contradict each other."""
    if (triple.documents, len(triple.tokens)) != (shard["rows"], shard["tokens"]):
        raise DataError(
            f"{triple.documents} conversations and {len(triple.tokens)} tokens, the manifest says {shard['rows']} and "
            f"{shard['tokens']}",
            source=where,
            remedy=_REBUILD,
        )
    lengths = np.diff(triple.bounds)
    last = triple.bounds[1:] - 1
    span = np.asarray(triple.span)
    tokens = np.asarray(triple.tokens)
    checks = (
        (
            (lengths < 1) | (lengths > manifest["seq_length"]),
            f"conversations outside 1..{manifest['seq_length']} tokens",
        ),
        ((tokens < 0) | (tokens >= manifest["tokenizer"]["vocab_size"]), "ids outside the vocabulary"),
        (span >= len(SPAN_NAMES), "span ids that do not exist"),
        (span[last] != 0, "conversations whose last label is supervised"),
        *signal_checks(triple, manifest),
    )
    for wrong, what in checks:
        if wrong.any():
            raise DataError(f"{int(wrong.sum())} {what}", source=where, remedy=_REBUILD)
    counts = np.bincount(span, minlength=len(SPAN_NAMES))
    return np.array([triple.documents, len(tokens), *counts.tolist()], dtype=np.int64)


def manifest_summary(dataset_dir: Path) -> str:
    """One line on what was verified."""
    manifest = json.loads((dataset_dir / FILE_NAME).read_bytes())
    if manifest["kind"] == CONVERSATIONS_KIND:
        return f"{len(manifest['shards'])} shards, {manifest['rows']:,} conversations"
    parts = [
        f"{split} {entry['rows']:,} conversations, {entry['tokens']:,} tokens"
        for split, entry in manifest["splits"].items()
    ]
    return "; ".join(parts)
