"""A dataset's vocabulary as files: whole, unaltered, and told apart from another one."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from megatron_vpmoe.data.vocabulary_files import VOCABULARY, another_vocabulary, identity_of, vocabulary_files
from megatron_vpmoe.errors import DataError, TokenizerError
from megatron_vpmoe.manifest import read_manifest
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
    assert identity_of({"generation_config.json": b"{}"}, "there") is None
    (root / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(TokenizerError, match="is missing"):
        vocabulary_files(read_manifest(root))


def test_identities_are_compared_whatever_files_name_them(tmp_path: Path) -> None:
    """Weights with a tokenizer.json and a dataset with a vocabulary.json share no file, and still differ."""
    ours = read_manifest(small_dataset(tmp_path / "ours", train=2, valid=1, shards=1))
    root = small_dataset(tmp_path / "theirs", train=2, valid=1, shards=1)
    entry = hashed(root, "tokenizer/tokenizer.json", b"{}")
    rewrite_manifest(
        root,
        lambda manifest: manifest["tokenizer"].update(
            name="hf_tokenizer", rank_file_sha256=entry["sha256"], files=[entry]
        ),
    )
    theirs = read_manifest(root)
    of_ours, of_theirs = vocabulary_files(ours), vocabulary_files(theirs)
    assert not of_ours.keys() & of_theirs.keys()
    for files, manifest in ((of_ours, ours), (of_theirs, theirs), ({}, ours)):
        assert another_vocabulary(files, manifest, "there") is None
    told = {**of_theirs, "tokenizer_config.json": b"another padding side"}
    assert another_vocabulary(told, theirs, "there") is None
    for files, manifest in ((of_theirs, ours), (of_ours, theirs), ({"tokenizer.json": b"[]"}, theirs)):
        assert "do not share a vocabulary" in (another_vocabulary(files, manifest, "there") or "")


@pytest.mark.parametrize(
    "content", [b"[]", b"{", b'{"name": 1}', b'{"compact_map": {"path": "../../x", "sha256": ""}}']
)
def test_a_vocabulary_that_says_nothing_is_refused(content: bytes) -> None:
    with pytest.raises(TokenizerError, match="does not say which vocabulary it is"):
        identity_of({VOCABULARY: content}, "there")


def test_a_name_in_a_manifest_never_leads_out_of_a_folder(tmp_path: Path) -> None:
    root = small_dataset(tmp_path / "data", train=2, valid=1, shards=1)
    entry = hashed(root, "sub/compact_vocab.npy", b"map")
    rewrite_manifest(root, lambda manifest: manifest["tokenizer"].update(compact_map=entry))
    files = vocabulary_files(read_manifest(root))
    assert all("/" not in name for name in files)
    assert json.loads(files[VOCABULARY])["compact_map"]["path"] == "compact_vocab.npy"
    for path in ("../compact_vocab.npy", "/etc/passwd", "a/../../b", "", "a\0b"):
        rewrite_manifest(root, lambda m, path=path: m["tokenizer"].update(compact_map={**entry, "path": path}))
        with pytest.raises(DataError, match="no name of a file in its folder"):
            read_manifest(root)
