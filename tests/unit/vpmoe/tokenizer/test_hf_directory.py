"""A vocabulary of an HF directory: what it learns, that transformers reads the same ids, and what is refused."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers
from transformers import AutoTokenizer

from tests.unit.vpmoe.upcycle.tiny_vocabularies import write_tokenizer
from vpmoe.errors import TokenizerError
from vpmoe.hf import tokenization_vpmoe
from vpmoe.tokenizer.bpe import SPECIAL_TOKENS, SpecialTokens, save_bpe, train_bpe
from vpmoe.tokenizer.hf_directory import HFDirectory, byte_characters

TEXTS = ["Question: Sort the digits 4 1 3.\nAnswer: 1 3 4\n", "Question: Add 16 and 96.\nAnswer: 112\n"] * 20


def written(special_tokens: SpecialTokens, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bpe")
    save_bpe(train_bpe(TEXTS, 285, special_tokens), path)
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written("qwen", tmp_path_factory)


@pytest.fixture(scope="module", params=["qwen", "harmony"])
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[SpecialTokens, HFDirectory, Any]:
    path = written(request.param, tmp_path_factory)
    return request.param, HFDirectory(path), AutoTokenizer.from_pretrained(path)


@settings(max_examples=25)
@given(st.text(alphabet=st.one_of(st.characters(codec="utf-8"), st.sampled_from("Question 12\n"))))
def test_ids_are_those_of_transformers_and_give_the_text_back(
    both: tuple[SpecialTokens, HFDirectory, Any], text: str
) -> None:
    special_tokens, ours, theirs = both
    ids = ours.encode_ordinary(text)
    assert ids.tolist() == theirs(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
    assert ours.decode(ids) == (unicodedata.normalize("NFC", text) if special_tokens == "qwen" else text)


def test_special_tokens_come_last_and_are_never_read_out_of_text(both: tuple[SpecialTokens, HFDirectory, Any]) -> None:
    special_tokens, ours, theirs = both
    names = SPECIAL_TOKENS[special_tokens]
    assert ours.vocab_size == len(theirs) == 285
    assert [ours.special_id(name) for name in names] == [*range(285 - len(names), 285)]
    assert theirs.convert_tokens_to_ids(list(names)) == [*range(285 - len(names), 285)]
    assert set(names) == set(theirs.all_special_tokens)
    assert theirs.eos_token == ("<|return|>" if special_tokens == "harmony" else "<|endoftext|>")
    assert not any(ours.is_special(row) for name in names for row in ours.encode_ordinary(f"a {name} b"))
    assert ours.decode([ours.eod_id]) == "<|endoftext|>"


def test_names_of_harmony_are_those_in_use() -> None:
    said = "<|endoftext|> <|return|> <|constrain|> <|channel|> <|start|> <|end|> <|message|> <|call|>"
    assert " ".join(SPECIAL_TOKENS["harmony"]) == said


def test_the_same_texts_in_another_order_give_the_same_file(tmp_path: Path) -> None:
    for name, texts in (("first", TEXTS), ("second", TEXTS[::-1])):
        save_bpe(train_bpe(texts, 300, "harmony"), tmp_path / name)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "first" / file).read_bytes() == (tmp_path / "second" / file).read_bytes()


def test_rows_are_padded_and_digits_stand_alone(folder: Path) -> None:
    ours = HFDirectory(folder, 320)
    assert len(ours.pieces()) == 320 and ours.pieces()[-1] == b""
    words = [ours.decode([row]) for row in ours.encode_ordinary("Question: 12")]
    assert words == ["Question", ":", " ", "1", "2"], "a digit is a token of its own"


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="cannot be read"):
        HFDirectory(tmp_path)
    with pytest.raises(TokenizerError, match="the manifest says 0"):
        HFDirectory(folder, sha256="0" * 64)
    with pytest.raises(TokenizerError, match="no UTF-8 form"):
        HFDirectory(folder).encode_ordinary("\ud800")
    with pytest.raises(TokenizerError, match="no special token"):
        HFDirectory(folder).special_id("<|return|>")
    with pytest.raises(TokenizerError, match="cannot hold the 259"):
        train_bpe(TEXTS, 258)
    write_tokenizer(tmp_path / "first", TEXTS[0], ["<|endoftext|>"], 270)
    with pytest.raises(TokenizerError, match="added tokens stand among the ordinary ones"):
        HFDirectory(tmp_path / "first")


def changed(**model: object) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {**content, "model": {**content["model"], **model}}


def moved(by: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda content: {
        **content,
        "added_tokens": [{**token, "id": token["id"] + by} for token in content["added_tokens"]],
    }


UNIGRAM = {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0]], "byte_fallback": False}
# As they come with published models, or were reported of them.
FAULTS: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "Unigram": (lambda content: {**content, "added_tokens": [], "model": UNIGRAM}, "no byte-level BPE"),
    "SentencePiece's form of BPE": (
        lambda content: {**content, "pre_tokenizer": None, "decoder": {"type": "ByteFallback"}},
        "no byte-level BPE",
    ),
    "no kind": (lambda content: {**content, "model": {**content["model"], "type": None}}, "no readable tokenizer"),
    "no merges": (
        lambda content: {**content, "model": {k: v for k, v in content["model"].items() if k != "merges"}},
        "no readable tokenizer: Missing vocab/merges",
    ),
    "merges of tokens that are none": (changed(merges=[["zz", "qq"]]), "out of vocabulary"),
    "merges that are none": (changed(merges=["a b c"]), "no readable tokenizer"),
    "a vocabulary without bytes": (
        lambda content: changed(vocab={"a": 0, "b": 1}, merges=[])(content) | {"added_tokens": []},
        "no token for byte 0x",
    ),
    "added tokens beyond the rows": (moved(10**6), "has id 1000282, and is read as 282"),
    "added tokens of one id": (
        lambda content: {**content, "added_tokens": [{**token, "id": 282} for token in content["added_tokens"]]},
        "has id 282, and is read as 283",
    ),
    "added tokens without ids": (
        lambda content: {**content, "added_tokens": [{"content": "<s>"}]},
        "missing field `id`",
    ),
    "dropout": (changed(dropout=0.1), "dropout"),
    "another version": (lambda content: {**content, "version": "2.0"}, "Unknown tokenizer version"),
    "an unfinished pattern": (
        lambda content: {
            **content,
            "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
        },
        "no readable tokenizer",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_of_public_tokenizers_are_named(name: str, folder: Path, tmp_path: Path) -> None:
    change, said = FAULTS[name]
    content = json.loads((folder / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps(change(content)))
    with pytest.raises(TokenizerError, match=re.escape(said)):
        HFDirectory(tmp_path)


def test_a_length_that_the_file_sets_cuts_and_fills_no_text(folder: Path, tmp_path: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    cut = {"max_length": 4, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    fill = {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0}
    content |= {"truncation": cut, "padding": {**fill, "pad_token": "!"}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    text = "Question: Sort the digits 4 1 3."
    assert HFDirectory(tmp_path).encode_ordinary(text).tolist() == HFDirectory(folder).encode_ordinary(text).tolist()


def test_bytes_are_written_as_exports_write_them() -> None:
    """The class inside an export imports nothing of ours, so it has a table of its own."""
    assert byte_characters() == tokenization_vpmoe.byte_characters()
    assert set(byte_characters()) == set(pre_tokenizers.ByteLevel.alphabet())
