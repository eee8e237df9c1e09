"""A dataset's vocabulary as files: whole, unaltered, and told apart from another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_vpmoe.data.manifest import read_manifest
from megatron_vpmoe.data.vocabulary_files import VOCABULARY, differing, name_a_vocabulary, vocabulary_files
from megatron_vpmoe.errors import TokenizerError
from tests.fixtures_dataset import rewrite_manifest, small_dataset


def hashed(root: Path, name: str, content: bytes) -> dict[str, str]:
    (root / name).parent.mkdir(exist_ok=True)
    (root / name).write_bytes(content)
    return {"path": name, "sha256": hashlib.sha256(content).hexdigest()}


def test_a_compact_vocabulary_brings_its_map(tmp_path: Path) -> None:
    root = small_dataset(tmp_path / "data", train=2, valid=1, shards=1)
    entry = hashed(root, "compact_vocab.npy", b"map")
    rewrite_manifest(root, lambda manifest: manifest["tokenizer"].update(compact_map=entry))
    files = vocabulary_files(read_manifest(root))
    assert files.keys() == {VOCABULARY, "compact_vocab.npy"} and files["compact_vocab.npy"] == b"map"
    assert json.loads(files[VOCABULARY])["compact_map"] == entry
    (root / "compact_vocab.npy").write_bytes(b"other")
    with pytest.raises(TokenizerError, match="the manifest says"):
        vocabulary_files(read_manifest(root))


def test_the_files_of_another_tokenizer_come_as_they_are(tmp_path: Path) -> None:
    root = small_dataset(tmp_path / "data", train=2, valid=1, shards=1)
    named = {"tokenizer/tokenizer.json": b"{}", "tokenizer/tokenizer_config.json": b"{ }"}
    entries = [hashed(root, name, content) for name, content in named.items()]
    rewrite_manifest(root, lambda manifest: manifest["tokenizer"].update(files=entries))
    files = vocabulary_files(read_manifest(root))
    assert files == {"tokenizer.json": b"{}", "tokenizer_config.json": b"{ }"}
    assert differing(files, {**files, "tokenizer_config.json": b"another padding side"}) == []
    assert name_a_vocabulary(files) and not name_a_vocabulary({"generation_config.json": b"{}"})
    assert differing(files, {"tokenizer.json": b"{'model': 1}"}) == ["tokenizer.json"]
    (root / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="is missing"):
        vocabulary_files(read_manifest(root))
