"""Ids back to text from the dataset's own table."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vpmoe.data.pieces import TokenPieces
from megatron_vpmoe.errors import TokenizerError
from megatron_vpmoe.manifest import read_manifest
from tests.fixtures_dataset import PADDED_VOCAB, VOCAB, small_dataset


def test_decodes_ids_by_line(tmp_path: Path):
    pieces = TokenPieces.load(read_manifest(small_dataset(tmp_path)))
    assert len(pieces) == PADDED_VOCAB
    assert pieces.decode([3, 1, 49]) == "<3><1><49>"
    assert pieces.decode([VOCAB]) == ""


def test_joins_bytes_before_decoding_and_marks_broken_ones():
    pieces = TokenPieces(["é".encode()[:1], "é".encode()[1:], b"x"])
    assert pieces.decode([0, 1, 2]) == "éx"
    assert pieces.decode([0, 2]) == "\ufffdx"
    assert pieces.decode_bytes([0]) == b"\xc3"


@pytest.mark.parametrize("token_id", [-1, 3])
def test_refuses_ids_outside_the_table(token_id: int):
    with pytest.raises(TokenizerError, match=f"token id {token_id} is outside the vocabulary of 3"):
        TokenPieces([b"a", b"b", b"c"]).decode([0, token_id])


def test_refuses_another_table(tmp_path: Path):
    root = small_dataset(tmp_path)
    manifest = read_manifest(root)
    (root / "token_pieces.txt").write_bytes(b"YQ==\n")
    with pytest.raises(TokenizerError, match="sha256"):
        TokenPieces.load(manifest)
    (root / "token_pieces.txt").unlink()
    with pytest.raises(TokenizerError, match="missing"):
        TokenPieces.load(manifest)
