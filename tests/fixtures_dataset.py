"""A built dataset in miniature, written with Megatron-Core's builder with a manifest like the builder's."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_vpmoe.annotation import NO_RECORD, Annotation
from megatron_vpmoe.annotation_files import AnnotationWriter
from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.files import read_record, write_record
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.sources import Teacher

VOCAB = 50
PADDED_VOCAB = 64
EOD = 1
DTYPES = {"tokens": np.int32, "lossmask": np.uint8, "span": np.uint8}


def conversation(length: int, seed: int) -> Document:
    """Half context, a quarter analysis, the rest final, then the end-of-document token; length >= 8."""
    random = np.random.default_rng([seed, length])
    tokens = random.integers(2, VOCAB, length).astype(np.int32)
    tokens[-1] = EOD
    described = np.zeros(length, np.uint8)  # of the token itself
    described[length // 2 : 3 * length // 4] = 1
    described[3 * length // 4 : length - 1] = 2
    span = np.append(described[1:], 0).astype(np.uint8)
    return Document(tokens, (span > 0).astype(np.uint8), span)


def write_dataset(
    root: Path, splits: dict[str, Sequence[Sequence[Document]]], *, seq_length: int, vocab_size: int = VOCAB
) -> Path:
    """Write shards (lists of conversations) of each split, ``token_pieces.txt`` and ``manifest.json`` into ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    pieces = b"".join(base64.b64encode(f"<{i}>".encode()) + b"\n" for i in range(vocab_size))
    pieces += b"\n" * (PADDED_VOCAB - vocab_size)
    (root / "token_pieces.txt").write_bytes(pieces)
    manifest = {
        "schema_version": 1,
        "kind": "harmony_kd",
        "seq_length": seq_length,
        "tokenizer": {
            "name": "o200k_harmony_compact",
            "rank_file_sha256": "0" * 64,
            "vocab_size": vocab_size,
            "padded_vocab_size": PADDED_VOCAB,
            "eod_id": EOD,
            "special_tokens": {"<|endoftext|>": EOD, "<|return|>": 2, "<|call|>": 3},
            "compact_map": None,
            "pieces": {"path": "token_pieces.txt", "sha256": hashlib.sha256(pieces).hexdigest()},
        },
        "splits": {split: _write_split(root / split, shards) for split, shards in splits.items()},
    }
    write_record(root / "manifest.json", manifest)
    return root


def small_dataset(root: Path, *, train: int = 40, valid: int = 10, seq_length: int = 48, shards: int = 2) -> Path:
    """Conversations of 8 to ``seq_length`` tokens, dealt out to shards; a pure function of the arguments."""
    lengths = np.random.default_rng(0).integers(8, seq_length + 1, train + valid)
    documents = [conversation(int(length), seed) for seed, length in enumerate(lengths)]
    return write_dataset(
        root,
        {
            "train": [documents[number:train:shards] for number in range(shards)],
            "valid": [documents[train + number :: shards] for number in range(shards)],
        },
        seq_length=seq_length,
    )


def rewrite_manifest(root: Path, change) -> None:
    """Apply ``change`` to the parsed manifest, which gets the hash that it then has."""
    path = root / "manifest.json"
    manifest = read_record(path)
    change(manifest)
    write_record(path, manifest)


def write_annotation(folder: Path, shard: str, annotation: Annotation, arrays: Sequence[np.ndarray]) -> dict[str, Any]:
    """An annotation of a shard's documents; the manifest's entries of its files."""
    writer = AnnotationWriter(folder, shard, annotation)
    for array in arrays:
        writer.add(array)
    return writer.close()


def stored_ahead(
    root: Path,
    declared: Sequence[Annotation],
    annotate: Callable[[Iterator[Document]], Iterable[Mapping[str, np.ndarray]]],
    *,
    seq_length: int = 48,
) -> Path:
    """The dataset, from here on with what ``annotate`` says of the documents of each shard in sidecars."""

    def change(manifest: dict[str, Any]) -> None:
        for split, entry in manifest["splits"].items():
            dataset, row = KDDataset(read_manifest(root), split, seq_length=seq_length), 0
            for shard in entry["shards"]:
                found = list(annotate(dataset[row + number] for number in range(shard["rows"])))
                for each in declared:
                    arrays = [values[each.name] for values in found]
                    shard["files"] |= write_annotation(root / split, shard["name"], each, arrays)
                row += shard["rows"]
        manifest["annotations"] = [each.model_dump() for each in declared]

    rewrite_manifest(root, change)
    return root


def with_records(
    root: Path, width: int, *, temperature: float = 1.0, unscored: float = 0.2, seq_length: int = 48
) -> Path:
    """The dataset with what a random teacher says of most supervised tokens."""
    declared = Teacher(width, temperature).annotations

    def annotate(documents: Iterator[Document]) -> Iterator[Mapping[str, np.ndarray]]:
        for document in documents:
            random = np.random.default_rng(len(document.tokens))
            logits = torch.from_numpy(2 * random.standard_normal((len(document.tokens), PADDED_VOCAB)))
            log_p, ids = (logits / temperature).log_softmax(-1).topk(width)
            none = torch.from_numpy((random.random(len(document.tokens)) < unscored) | (document.loss_mask == 0))
            ids, log_p = ids.masked_fill(none[:, None], NO_RECORD), log_p.masked_fill(none[:, None], 0)
            values = (ids.int(), log_p.float(), log_p[:, 0].float())
            yield {each.name: found.numpy() for each, found in zip(declared, values, strict=True)}

    return stored_ahead(root, declared, annotate, seq_length=seq_length)


def write_part(folder: Path, shard: str, part: str, arrays: Sequence[np.ndarray], dtype: type | None = None) -> None:
    """One IndexedDataset of a shard."""
    prefix = folder / f"{shard}_{part}"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype or DTYPES[part])
    for array in arrays:
        builder.add_document(torch.from_numpy(array.astype(np.int64)), [len(array)])
    builder.finalize(f"{prefix}.idx")


def describe_files(folder: Path, shard: str) -> dict[str, dict[str, int | str]]:
    """The manifest's entry of a shard's files, as they are on disk."""
    return {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in sorted(folder.glob(f"{shard}_*"))
    }


def _write_split(folder: Path, shards: Sequence[Sequence[Document]]) -> dict:
    folder.mkdir(exist_ok=True)
    entries = []
    for number, documents in enumerate(shards):
        name = f"shard_{number:02d}"
        write_part(folder, name, "tokens", [document.tokens for document in documents])
        write_part(folder, name, "lossmask", [document.loss_mask for document in documents])
        write_part(folder, name, "span", [document.span_id for document in documents])
        tokens = sum(len(document.tokens) for document in documents)
        entries.append({"name": name, "rows": len(documents), "tokens": tokens, "files": describe_files(folder, name)})
    return {
        "rows": sum(entry["rows"] for entry in entries),
        "tokens": sum(entry["tokens"] for entry in entries),
        "shards": entries,
    }
