"""A vocabulary of an HF directory: what it learns, that transformers reads the same ids, and what is refused."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from vpmoe.errors import TokenizerError
from vpmoe.hf import tokenization_vpmoe
from vpmoe.tokenizer.bpe import SPECIAL_TOKENS, save_bpe, train_bpe
from vpmoe.tokenizer.hf_directory import HFDirectory, byte_characters

TEXTS = ["Question: Sort the digits 4 1 3.\nAnswer: 1 3 4\n", "Question: Add 16 and 96.\nAnswer: 112\n"] * 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe")
    save_bpe(train_bpe(TEXTS, 285), path)
    return path


@pytest.fixture(scope="module")
def ours(folder: Path) -> HFDirectory:
    return HFDirectory(folder)


@pytest.fixture(scope="module")
def theirs(folder: Path):
    return AutoTokenizer.from_pretrained(folder)


@settings(max_examples=25, deadline=None)
@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("Question 12\n"))))
def test_ids_are_those_of_transformers_and_give_the_text_back(ours: HFDirectory, theirs, text: str) -> None:
    ids = ours.encode_ordinary(text)
    assert ids.tolist() == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.decode(ids) == unicodedata.normalize("NFC", text)


def test_special_tokens_come_last_and_are_never_read_out_of_text(folder: Path) -> None:
    ours = HFDirectory(folder, 320)
    assert ours.vocab_size == 285
    assert [ours.special_id(name) for name in SPECIAL_TOKENS] == [282, 283, 284]
    assert not any(ours.is_special(row) for row in ours.encode_ordinary("<|endoftext|> <|im_start|>"))
    assert ours.decode([ours.eod_id]) == "<|endoftext|>"
    assert len(ours.pieces()) == 320 and ours.pieces()[-1] == b""
    words = [ours.decode([row]) for row in ours.encode_ordinary("Question: 12")]
    assert words == ["Question", ":", " ", "1", "2"], "a digit is a token of its own"


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="no readable tokenizer"):
        HFDirectory(tmp_path)
    with pytest.raises(TokenizerError, match="the manifest says 0"):
        HFDirectory(folder, sha256="0" * 64)
    with pytest.raises(TokenizerError, match="no UTF-8 form"):
        HFDirectory(folder).encode_ordinary("\ud800")
    with pytest.raises(TokenizerError, match="no special token"):
        HFDirectory(folder).special_id("<|return|>")
    with pytest.raises(TokenizerError, match="cannot hold the 259"):
        train_bpe(TEXTS, 258)
    content = json.loads((folder / "tokenizer.json").read_text())
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**content, "model": {**content["model"], "type": "Unigram"}}))
    with pytest.raises(TokenizerError, match="no byte-level BPE"):
        HFDirectory(tmp_path)
    moved = [{**entry, "id": entry["id"] + 1} for entry in content["added_tokens"]]
    path.write_text(json.dumps({**content, "added_tokens": moved}))
    with pytest.raises(TokenizerError, match="gaps"):
        HFDirectory(tmp_path)


def test_bytes_are_written_as_exports_write_them() -> None:
    """The class inside an export imports nothing of ours, so it has a table of its own."""
    assert byte_characters() == tokenization_vpmoe.byte_characters()
    assert set(byte_characters()) == set(pre_tokenizers.ByteLevel.alphabet())
