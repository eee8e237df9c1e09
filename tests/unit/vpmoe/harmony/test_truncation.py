"""Truncation keeps structure and the final answer, cuts the front of the analysis, then of the user's text."""

import numpy as np
import pytest
from harmony_strategies import TEXTS, conversations
from hypothesis import given
from hypothesis import strategies as st

from tests.conftest import fuzz_settings
from vpmoe.errors import DataError
from vpmoe.harmony.conversation import Message, check_conversation
from vpmoe.harmony.parse import Parser
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.harmony.truncation import BRANCHES, make_fit
from vpmoe.tokenizer.interface import Tokenizer

WORDS = " word" * 20
MESSAGES = (
    Message("system", "Reasoning: low"),
    Message("user", "question" + WORDS),
    Message("assistant", "thought" + WORDS, "analysis"),
    Message("assistant", "answer" + WORDS, "final"),
)


def chats() -> st.SearchStrategy[tuple[Message, ...]]:
    """Conversations whose texts begin and end in blanks, with and without an analysis."""
    texts = st.tuples(st.text(" \n\u3000", max_size=6), TEXTS, st.text(" \n\u3000", max_size=6)).map("".join)
    whole = conversations(texts | TEXTS)
    return whole | whole.map(lambda messages: (*messages[:-2], messages[-1]))


@fuzz_settings(200)
@given(messages=chats(), seq_len=st.integers(1, 120))
def test_what_is_kept_is_valid_and_teaches_no_empty_text(
    tokenizer: Tokenizer, messages: tuple[Message, ...], seq_len: int
) -> None:
    whole = FastRenderer(tokenizer).render(messages)
    fitted = make_fit(tokenizer, seq_len)(whole)
    assert fitted.branch in BRANCHES
    if len(whole) + 1 <= seq_len:
        assert fitted.branch == "whole" and fitted.conversation is whole
        return
    lost = {"analysis": fitted.analysis_tokens_cut, "user": fitted.user_tokens_cut}
    if fitted.conversation is None:
        assert (fitted.branch == "dropped_final_too_long") == (len(whole.messages[-1]) + 1 > seq_len)
        assert not any(lost.values())
        return
    cut = fitted.conversation
    kept = Parser(tokenizer).messages(cut.tokens())
    opening = FastRenderer(tokenizer).generation_prompt(kept[: [message.role for message in kept].index("user") + 1])
    if kept[-2].channel == "analysis":
        check_conversation(kept)
        assert Parser(tokenizer).judge_completion(cut.tokens()[len(opening) :]).valid
    for message, before in zip(kept, messages, strict=True):
        assert message.content.strip() and before.content.endswith(message.content)
    for before, after in zip(whole.messages, cut.messages, strict=True):
        name = before.channel or before.role
        assert np.array_equal(before.header, after.header) and np.array_equal(before.terminator, after.terminator)
        assert len(before.content) - len(after.content) == lost.get(name, 0)
    assert fitted.branch == f"{kept[-2].channel or 'user'}_cut"
    # No more is cut than needed, but for the rest of a character (at most 3 bytes).
    assert 0 <= seq_len - (len(cut) + 1) <= 3


@pytest.mark.parametrize(
    ("shorter_by", "branch", "analysis_cut", "user_cut"),
    [
        (0, "whole", 0, 0),
        (1, "analysis_cut", 1, 0),
        (20, "analysis_cut", 20, 0),
        (21, "dropped_context_too_long", 0, 0),
        (-1, "user_cut", 0, 1),
        (-20, "user_cut", 0, 20),
        (-21, "dropped_context_too_long", 0, 0),
    ],
)
def test_each_branch_at_its_border(
    full: Tokenizer, shorter_by: int, branch: str, analysis_cut: int, user_cut: int
) -> None:
    """Below 0: of a turn without analysis."""
    whole = FastRenderer(full).render(MESSAGES if shorter_by >= 0 else (*MESSAGES[:-2], MESSAGES[-1]))
    shorter_by = abs(shorter_by)
    fitted = make_fit(full, len(whole) + 1 - shorter_by)(whole)
    assert (fitted.branch, fitted.analysis_tokens_cut, fitted.user_tokens_cut) == (branch, analysis_cut, user_cut)


def test_a_final_message_that_cannot_fit_alone_drops_the_example(full: Tokenizer) -> None:
    whole = FastRenderer(full).render(MESSAGES)
    length = len(whole.messages[-1]) + 1
    assert make_fit(full, length)(whole).branch == "dropped_context_too_long"
    assert make_fit(full, length - 1)(whole).branch == "dropped_final_too_long"


def test_a_length_that_holds_nothing_is_refused(full: Tokenizer) -> None:
    with pytest.raises(DataError, match="--seq-len"):
        make_fit(full, 0)
