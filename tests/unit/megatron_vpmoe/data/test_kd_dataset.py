"""The reader: what is written is read; every kind of damage is refused on opening, and named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.errors import DataError, TokenizerError, VpmoeError
from tests.fixtures_dataset import (
    PADDED_VOCAB,
    VOCAB,
    conversation,
    describe_files,
    rewrite_manifest,
    write_dataset,
    write_part,
)

LENGTHS = [[12, 20, 9], [], [33]]


def documents() -> list[list]:
    return [[conversation(length, seed) for seed, length in enumerate(shard)] for shard in LENGTHS]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Three shards of training conversations, the middle one empty, and a validation split."""
    return write_dataset(tmp_path / "set", {"train": documents(), "valid": [[conversation(10, 9)]]}, seq_length=48)


def open_train(root: Path, seq_length: int = 48, padded_vocab_size: int = PADDED_VOCAB) -> KDDataset:
    return KDDataset.open(root, "train", seq_length=seq_length, padded_vocab_size=padded_vocab_size)


def refused(root: Path, **arguments) -> VpmoeError:
    with pytest.raises(VpmoeError) as caught:
        open_train(root, **arguments)
    assert caught.value.remedy and caught.value.source
    return caught.value


def redescribe(root: Path, number: int = 0) -> None:
    """Make the manifest's sizes those on disk, so that only the deeper checks can find what is wrong."""
    files = describe_files(root / "train", f"shard_{number:02d}")
    rewrite_manifest(root, lambda m: m["splits"]["train"]["shards"][number].update(files=files))


def test_reads_what_was_written_across_shards(root: Path):
    dataset = open_train(root)
    written = [document for shard in documents() for document in shard]
    assert len(dataset) == 4
    assert dataset.lengths.tolist() == [12, 20, 9, 33]
    for index, document in enumerate(written):
        for field in ("tokens", "loss_mask", "span_id"):
            read = getattr(dataset[index], field)
            assert read.dtype == getattr(document, field).dtype
            assert read.tolist() == getattr(document, field).tolist()
    with pytest.raises(IndexError):
        dataset[4]


def test_no_dataset(tmp_path: Path):
    error = refused(tmp_path / "absent")
    assert isinstance(error, DataError) and "does not exist" in str(error) and "absent" in str(error)
    assert "no manifest.json" in str(refused(tmp_path))


def test_broken_manifest(root: Path):
    path = root / "manifest.json"
    text = path.read_text()
    for broken in (text[: len(text) // 2], "[]", "[" * 100_000):
        path.write_text(broken)
        assert "manifest.json" in str(refused(root))
    path.write_text(text)
    rewrite_manifest(root, lambda m: m["tokenizer"].pop("eod_id"))
    assert "tokenizer.eod_id" in str(refused(root))


def test_other_schema_version(root: Path):
    rewrite_manifest(root, lambda m: m.update(schema_version=2))
    assert "schema_version 2" in str(refused(root))


def test_missing_file(root: Path):
    (root / "train" / "shard_02_span.idx").unlink()
    assert "shard_02_span.idx is missing" in str(refused(root))


def test_wrong_size(root: Path):
    with (root / "train" / "shard_00_lossmask.bin").open("ab") as stream:
        stream.write(b"\0")
    assert "shard_00_lossmask.bin has 42 bytes, the manifest says 41" in str(refused(root))


def test_file_that_the_manifest_does_not_list(root: Path):
    rewrite_manifest(root, lambda m: m["splits"]["train"]["shards"][0]["files"].pop("shard_00_span.bin"))
    assert "shard_00_span.bin is not in the manifest" in str(refused(root))


def test_sidecar_with_other_lengths(root: Path):
    masks = [document.loss_mask for document in documents()[0]]
    masks[1], masks[2] = masks[1][:-1], np.append(masks[2], 0)
    write_part(root / "train", "shard_00", "lossmask", masks)
    redescribe(root)
    assert "lossmask and tokens disagree: another length of document 1" in str(refused(root))


def test_sidecar_with_fewer_rows(root: Path):
    write_part(root / "train", "shard_00", "span", [document.span_id for document in documents()[0][:2]])
    redescribe(root)
    assert "span and tokens disagree: another number of documents" in str(refused(root))


def test_sidecar_of_another_dtype(root: Path):
    write_part(root / "train", "shard_00", "span", [document.span_id for document in documents()[0]], dtype=np.int32)
    redescribe(root)
    assert "int32" in str(refused(root)) and "uint8" in str(refused(root))


@pytest.mark.parametrize("left", [0, 20, 60])
def test_truncated_index(root: Path, left: int):
    path = root / "train" / "shard_00_tokens.idx"
    path.write_bytes(path.read_bytes()[:left])
    redescribe(root)
    assert str(path) in str(refused(root)) and "the index" in str(refused(root))


def test_index_of_another_kind(root: Path):
    path = root / "train" / "shard_00_tokens.idx"
    path.write_bytes(b"TNTIDX" + path.read_bytes()[6:])
    redescribe(root)
    assert "not an index" in str(refused(root))


def test_two_sequences_in_one_document(root: Path):
    builder = IndexedDatasetBuilder(str(root / "train" / "shard_02_span.bin"), dtype=np.uint8)
    builder.add_document(np.zeros(33), [16, 17])
    builder.finalize(str(root / "train" / "shard_02_span.idx"))
    redescribe(root, number=2)
    assert "does not describe one document a conversation" in str(refused(root))


def test_index_of_another_file(root: Path):
    write_part(root / "train", "other", "tokens", [document.tokens[:-1] for document in documents()[0]])
    (root / "train" / "other_tokens.idx").replace(root / "train" / "shard_00_tokens.idx")
    redescribe(root)
    assert "the file has 164 bytes, its index asks for 152" in str(refused(root))


def test_rows_that_the_manifest_counts_differently(root: Path):
    rewrite_manifest(root, lambda m: m["splits"]["train"]["shards"][2].update(rows=2))
    assert "2 rows and 33 tokens" in str(refused(root))
    rewrite_manifest(root, lambda m: m["splits"]["train"]["shards"][2].update(rows=1))
    rewrite_manifest(root, lambda m: m["splits"]["train"].update(rows=5))
    assert "counts 5 conversations, the shards hold 4" in str(refused(root))


def test_conversation_longer_than_a_row(root: Path):
    error = refused(root, seq_length=32)
    assert "number 3, has 33 tokens" in str(error) and "--seq-length 33" in str(error)


def test_token_outside_the_vocabulary(tmp_path: Path):
    bad = conversation(12, 0)
    bad.tokens[4] = VOCAB
    root = write_dataset(tmp_path, {"train": [[conversation(9, 1), bad]]}, seq_length=48)
    assert f"token id {VOCAB} is outside" in str(refused(root))
    bad.tokens[4] = -1
    root = write_dataset(tmp_path, {"train": [[conversation(9, 1), bad]]}, seq_length=48)
    assert "token id -1 is outside" in str(refused(root))


def test_token_outside_the_vocabulary_past_the_part_scanned_on_opening(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("megatron_vpmoe.data.kd_dataset.SCANNED_TOKENS", 9)
    bad = conversation(12, 0)
    bad.tokens[4] = VOCAB
    root = write_dataset(tmp_path, {"train": [[conversation(9, 1), bad]]}, seq_length=48)
    dataset = open_train(root)
    assert len(dataset[0].tokens) == 9
    with pytest.raises(DataError, match="shard_00, row 1"):
        dataset[1]


def test_empty_split(tmp_path: Path):
    root = write_dataset(tmp_path, {"train": [[]]}, seq_length=48)
    assert "'train' has no conversations" in str(refused(root))
    with pytest.raises(DataError, match="'valid' has no conversations"):
        KDDataset.open(root, "valid", seq_length=48, padded_vocab_size=PADDED_VOCAB)


def test_vocabulary_of_another_model(root: Path):
    error = refused(root, padded_vocab_size=201088)
    assert isinstance(error, TokenizerError)
    assert "201088" in str(error) and f"--padded-vocab-size {PADDED_VOCAB}" in str(error)


def test_manifest_hash_follows_the_content_and_not_the_commit_that_built_it(root: Path):
    before = open_train(root).manifest.sha256
    rewrite_manifest(root, lambda m: m.update(git={"sha": "another commit", "dirty": True}))
    assert open_train(root).manifest.sha256 == before
    rewrite_manifest(root, lambda m: next(iter(m["splits"]["valid"]["shards"][0]["files"].values())).update(sha256="1"))
    assert open_train(root).manifest.sha256 != before
