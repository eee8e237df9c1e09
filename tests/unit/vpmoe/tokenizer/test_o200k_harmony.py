"""The full vocabulary: ids by name, text that stays text, and the way back."""

import pytest
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.errors import TokenizerError
from vpmoe.tokenizer.o200k_harmony import ALL_SPECIAL_TOKENS, SPLIT_PATTERN, VOCAB_SIZE, O200kHarmony

# What the design fixes; the code may not drift from it.
FIXED_IDS = {
    "<|startoftext|>": 199998,
    "<|endoftext|>": 199999,
    "<|return|>": 200002,
    "<|constrain|>": 200003,
    "<|channel|>": 200005,
    "<|start|>": 200006,
    "<|end|>": 200007,
    "<|message|>": 200008,
    "<|call|>": 200012,
}
TEXTS = st.text(st.characters(exclude_categories=["Cs"])) | st.lists(
    st.sampled_from([*FIXED_IDS, " ", "\n", "a", "é", "漢", "12345"]), max_size=8
).map("".join)


def test_special_ids(full: O200kHarmony) -> None:
    assert full.special_tokens == FIXED_IDS
    assert sorted(ALL_SPECIAL_TOKENS.values()) == list(range(199_998, 201_088))
    assert full.special_id("<|reserved_201087|>") == VOCAB_SIZE - 1
    assert full.eod_id == 199_999
    with pytest.raises(TokenizerError, match="reserved_201088"):
        full.special_id("<|reserved_201088|>")


@given(text=TEXTS)
def test_text_is_ordinary_and_decodes_to_itself(full: O200kHarmony, text: str) -> None:
    ids = full.encode_ordinary(text)
    assert not any(full.is_special(int(token)) for token in ids)
    assert full.decode(ids) == text


@given(text=TEXTS)
def test_equals_tiktokens_own_ordinary_encoding(full: O200kHarmony, text: str) -> None:
    assert full.encode_ordinary(text).tolist() == _reference(full).encode_ordinary(text)


def test_published_examples(full: O200kHarmony) -> None:
    # Ids of o200k_base as published; a wrong split pattern or rank file changes them.
    assert full.encode_ordinary("tiktoken is great!").tolist() == [83, 8251, 2488, 382, 2212, 0]
    assert full.encode_ordinary("2 + 2 = 4").tolist() == [17, 659, 220, 17, 314, 220, 19]


LETTERS = ["a", "B", "é", "漢", "12", "'s", "./", "\u0301", "ע"]
BLANKS = ["\t", "\v", "\f", "\x85", "\xa0", "\u1680", "\u2003", "\u2028", "\u202f", "\u3000", "\x1c", "\u200b"]


@settings(max_examples=500)
@given(
    text=st.lists(
        st.sampled_from(
            [*BLANKS, " ", "  ", "   ", "\r", "\n", "\r\n", "a", "B", "é", "漢", "12", "'s", "./", "\u0301", "ע"]
        ),
        max_size=14,
    ).map("".join)
)
def test_runs_of_blanks_are_cut_as_the_published_pattern_cuts_them(full: O200kHarmony, text: str) -> None:
    assert full.encode_ordinary(text).tolist() == _reference(full).encode_ordinary(text)


def test_a_lone_surrogate_is_refused_and_a_million_blanks_are_not(full: O200kHarmony) -> None:
    with pytest.raises(TokenizerError, match="no UTF-8 form"):
        full.encode_ordinary("a\ud800b")
    # The published pattern backtracks and exhausts its stack on this.
    assert full.decode(full.encode_ordinary(" " * 1_000_000)) == " " * 1_000_000


@pytest.mark.parametrize("token_id", [-1, VOCAB_SIZE])
def test_an_id_outside_the_vocabulary_does_not_decode(full: O200kHarmony, token_id: int) -> None:
    with pytest.raises(TokenizerError, match=str(token_id)):
        full.decode([token_id])


def test_pieces_cover_every_id(full: O200kHarmony) -> None:
    pieces = full.pieces()
    assert len(pieces) == VOCAB_SIZE and all(pieces)
    assert pieces[200_006] == b"<|start|>"


_CACHE: list[tiktoken.Encoding] = []


def _reference(full: O200kHarmony) -> tiktoken.Encoding:
    if not _CACHE:
        _CACHE.append(
            tiktoken.Encoding(
                "reference", pat_str=SPLIT_PATTERN, mergeable_ranks=full.ranks, special_tokens=ALL_SPECIAL_TOKENS
            )
        )
    return _CACHE[0]
