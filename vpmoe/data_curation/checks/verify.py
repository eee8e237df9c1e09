"""Re-checking a dataset against its manifest and against itself; every fault is listed, not only the first.

Of token files: hash of each file, lengths of the three signals, ids within the vocabulary, <|endoftext|> at each end,
loss mask and span in agreement, annotations as declared, a teacher's records readable, all sums of the manifest, no
document in both splits; and for a sample of conversations, spans worked out a second time by the parser. Of
conversation shards: hash, rows, and that no file was added.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.annotation_files import check_annotation, read_records
from megatron_vpmoe.files import Tell, inside, read_json_lines, sha256_of_file
from megatron_vpmoe.manifest import FILE_NAME, PAIR, PREFERENCE, Content
from megatron_vpmoe.token_files import Triple, file_names, read_triple
from vpmoe.data_curation.checks.duplicates import across_splits, bytes_to_read
from vpmoe.data_curation.checks.kinds import REBUILD, check_sample, signal_checks
from vpmoe.data_curation.conversations.store import open_shard
from vpmoe.data_curation.datasets.encode import Documents
from vpmoe.data_curation.datasets.plan import SPLITS
from vpmoe.data_curation.datasets.write import SplitStats, histogram_width
from vpmoe.data_curation.manifest import CONVERSATIONS, check_files, read_manifest
from vpmoe.errors import DataError, VpmoeError
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.progress import hashing
from vpmoe.steps import RECEIPT, read_receipt
from vpmoe.tokenizer import Tokenizer
from vpmoe.tokenizer.from_dataset import load_tokenizer

_RECONVERT = "convert again with --overwrite, or write the manifest again if the shards are right"
_AGAIN = "restore the file from a copy, or make the folder again with --overwrite"
DEFAULT_PARSED_PER_SHARD = 200
Faults = Iterator[VpmoeError]


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
    with hashing("verifying", _bytes_of(manifest)) as tell:
        checks = [_receipt_faults(dataset_dir), _reject_faults(dataset_dir, manifest)]
        if manifest["kind"] == CONVERSATIONS:
            checks.append(_conversation_faults(dataset_dir, manifest, tell))
        else:
            checks += [
                _input_faults(manifest, input_dir),
                _named_file_faults(dataset_dir, manifest),
                _token_faults(dataset_dir, manifest, parsed_per_shard, tell),
            ]
        return [str(fault) for faults in checks for fault in faults]


def _bytes_of(manifest: dict[str, Any]) -> int:
    if manifest["kind"] == CONVERSATIONS:
        return manifest["bytes"]
    shards = [shard for entry in manifest["splits"].values() for shard in entry["shards"]]
    listed = sum(file["bytes"] for shard in shards for file in shard["files"].values())
    return listed + bytes_to_read(manifest)


def summary(dataset_dir: Path) -> str:
    """One line on what was verified."""
    manifest = read_manifest(dataset_dir)
    if manifest["kind"] == CONVERSATIONS:
        return f"{len(manifest['shards'])} shards, {manifest['rows']:,} conversations"
    splits = manifest["splits"].items()
    return "; ".join(f"{split} {entry['rows']:,} documents, {entry['tokens']:,} tokens" for split, entry in splits)


def _conversation_faults(folder: Path, manifest: dict[str, Any], tell: Tell) -> Faults:
    for entry in manifest["shards"]:
        path = inside(folder, entry["name"])
        try:
            check_files(folder, {entry["name"]: entry}, remedy=_RECONVERT, tell=tell)
            metadata = open_shard(path).metadata
        except DataError as error:
            yield error
            continue
        for what, found in (("rows", metadata.num_rows), ("row_groups", metadata.num_row_groups)):
            if found != entry[what]:
                said = f"{found} {what}, the manifest says {entry[what]}"
                yield DataError(said, source=str(path), remedy=_RECONVERT)
    by_name = {entry["name"]: entry for entry in manifest["shards"]}
    sums = [sum(entry[of] for entry in by_name.values()) for of in ("rows", "bytes")]
    if len(by_name) < len(manifest["shards"]) or sums != [manifest["rows"], manifest["bytes"]]:
        what = f"the shards do not add up to {manifest['rows']} rows and {manifest['bytes']} bytes, each shard once"
        yield DataError(what, source=str(folder / FILE_NAME), remedy=_RECONVERT)
    yield from _unlisted(folder, "*.parquet", set(by_name), _RECONVERT)


def _input_faults(manifest: dict[str, Any], input_dir: Path | None) -> Faults:
    if input_dir is None:
        return
    path, built_from = input_dir / FILE_NAME, manifest["input_manifest_sha256"]
    if not path.is_file():
        yield DataError("the input has no manifest", source=str(path), remedy="pass the folder it was built from")
    elif (found := sha256_of_file(path)) != built_from:
        what = f"the input's manifest has sha256 {found}, the dataset was built from {built_from}"
        yield DataError(what, source=str(path), remedy=REBUILD)


def _named_file_faults(folder: Path, manifest: dict[str, Any]) -> Faults:
    entry = manifest["tokenizer"]
    for named in filter(None, (entry["pieces"], entry["compact_map"], *entry.get("files", ()))):
        try:
            check_files(folder, {named["path"]: named}, remedy=REBUILD)
        except DataError as error:
            yield error
    for split in SPLITS:
        listed = {name for shard in manifest["splits"][split]["shards"] for name in shard["files"]}
        yield from _unlisted(folder / split, "*", listed, REBUILD)


def _receipt_faults(folder: Path) -> Faults:
    """A receipt that is there is sound in itself; the files are held against the manifest."""
    try:
        if (folder / RECEIPT).exists():
            read_receipt(folder)
    except VpmoeError as error:
        yield error


def _reject_faults(folder: Path, manifest: dict[str, Any]) -> Faults:
    rejects = manifest["rejects"]
    if rejects["path"] is None:  # of conversations that another program wrote
        return
    try:
        # Of one that was made before the list's hash was kept, only the count is known.
        check_files(
            folder, {rejects["path"]: {"sha256": rejects["sha256"]}} if "sha256" in rejects else {}, remedy=_AGAIN
        )
        listed = sum(1 for _ in read_json_lines(inside(folder, rejects["path"])))
    except DataError as error:
        yield error
    else:
        if listed != rejects["count"]:
            what = f"{listed} rejects are listed, the manifest says {rejects['count']}"
            yield DataError(what, source=str(folder / rejects["path"]), remedy=_AGAIN)


def _unlisted(folder: Path, pattern: str, listed: set[str], remedy: str) -> Faults:
    for path in sorted(folder.glob(pattern)):
        if path.name not in listed:
            yield DataError("a file that the manifest does not list", source=str(path), remedy=remedy)


def _token_faults(folder: Path, manifest: dict[str, Any], parsed: int, tell: Tell) -> Faults:
    tokenizer = None
    try:
        tokenizer = load_tokenizer(folder)
        yield from _vocabulary_faults(folder, manifest["tokenizer"], tokenizer)
    except VpmoeError as error:
        yield error
    content = Content.model_validate(manifest)
    shards_sound = True
    for split, entry in manifest["splits"].items():
        counted, all_sound = SplitStats(), True
        for shard in entry["shards"]:
            where = f"{split}/{shard['name']}"
            try:
                if sorted(shard["files"]) != sorted(file_names(shard["name"], content.stored)):
                    raise DataError(
                        f"its files are listed as {', '.join(shard['files'])}", source=where, remedy=REBUILD
                    )
                check_files(folder / split, shard["files"], remedy=REBUILD, tell=tell)
                triple = read_triple(folder / split, shard["name"])
                _check_signals(triple, manifest, shard, where, counted)
                for annotation in content.stored:
                    check_annotation(folder / split, shard["name"], annotation, triple.lengths)
                if content.teacher is not None:
                    records = read_records(folder / split, shard["name"], content.teacher, triple)
                    for document in range(triple.documents):
                        records(document)
                if tokenizer is not None:
                    check_sample(triple, tokenizer, manifest, parsed, where)
            except VpmoeError as error:
                all_sound = False
                yield error
        # Sums over the sound shards only would repeat the fault of the others.
        if all_sound:
            yield from _sum_faults(split, counted, manifest)
        shards_sound &= all_sound
    if shards_sound and (found := across_splits(folder, manifest, tell))[0]:
        yield DataError(
            f"{found[0]} documents of the smaller split are in the other one too; the first is {found[1]}",
            source=str(folder),
            remedy="build it with --split-by content (of rows: without --id-field), or drop the copies from the rows",
        )


def _vocabulary_faults(folder: Path, said: dict[str, Any], tokenizer: Tokenizer) -> Faults:
    if other := [name for name, value in tokenizer.entry.items() if said[name] != value]:
        what = f"the vocabulary's own {', '.join(other)} is another"
        yield DataError(what, source=f"{folder / FILE_NAME}: tokenizer", remedy=REBUILD)


def _check_signals(
    triple: Triple, manifest: dict[str, Any], shard: dict[str, Any], where: str, counted: SplitStats
) -> None:
    """Count a shard, a part at a time; raises :class:`DataError` for signals that contradict each other."""
    found, said = (triple.documents, len(triple.tokens)), (shard["rows"], shard["tokens"])
    if found != said:
        what = f"{found[0]} documents and {found[1]} tokens, the manifest says {said[0]} and {said[1]}"
        raise DataError(what, source=where, remedy=REBUILD)
    wrong = Counter[str]()
    for part in triple.parts(PAIR if manifest["kind"] == PREFERENCE else 1):
        for places, what in signal_checks(part, manifest):
            if count := int(places.sum()):
                wrong[what] += count
                break
        else:
            documents = Documents(part.tokens, part.lossmask, part.span, part.lengths.astype(np.int64))
            counted.add(documents, histogram_width(manifest["seq_length"]))
    for what, count in wrong.items():
        raise DataError(f"{count} {what}", source=where, remedy=REBUILD)


def _sum_faults(split: str, counted: SplitStats, manifest: dict[str, Any]) -> Faults:
    entry, lengths = manifest["splits"][split], manifest["length_histogram"]
    said = [entry["rows"], entry["tokens"], [entry["span_tokens"][name] for name in SPAN_NAMES]]
    if [counted.rows, counted.tokens, counted.span_tokens] != said:
        what = f"rows, tokens and span tokens of the shards do not add up to {said}"
        yield DataError(what, source=f"{FILE_NAME}: splits.{split}", remedy=REBUILD)
    said = [lengths["bin_width"], lengths[split]["counts"], lengths[split]["longest"]]
    if [histogram_width(manifest["seq_length"]), counted.histogram, counted.longest] != said:
        what = "the lengths of the documents are not those of the histogram"
        yield DataError(what, source=f"{FILE_NAME}: length_histogram.{split}", remedy=REBUILD)
