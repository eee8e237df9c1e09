"""Truncation keeps structure and the final answer, cuts the front of the analysis, then of the user's text."""

import numpy as np
import pytest
from harmony_strategies import conversations
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vpmoe.errors import DataError
from vpmoe.harmony.conversation import Message
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


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=150)
@given(messages=conversations(), seq_len=st.integers(1, 120))
def test_invariants(tokenizer: Tokenizer, messages: tuple[Message, ...], seq_len: int) -> None:
    whole = FastRenderer(tokenizer).render(messages)
    fitted = make_fit(tokenizer, seq_len)(whole)
    assert fitted.branch in BRANCHES
    if len(whole) + 1 <= seq_len:
        assert fitted.branch == "whole" and fitted.conversation is whole
        return
    if fitted.conversation is None:
        cuttable = len(whole.messages[-2].content) + len(whole.messages[-3].content)
        assert len(whole) + 1 - cuttable > seq_len
        assert (fitted.branch == "dropped_final_too_long") == (len(whole.messages[-1]) + 1 > seq_len)
        return
    cut = fitted.conversation
    assert len(cut) + 1 <= seq_len
    Parser(tokenizer).parse(cut.tokens())
    for before, after in zip(whole.messages, cut.messages, strict=True):
        assert np.array_equal(before.header, after.header) and np.array_equal(before.terminator, after.terminator)
        assert np.array_equal(before.content[len(before.content) - len(after.content) :], after.content)
        tokenizer.decode_bytes(after.content).decode()  # raises if the cut falls inside a character
    *context, user, analysis, final = range(len(whole.messages))
    lost = [len(b.content) - len(a.content) for b, a in zip(whole.messages, cut.messages, strict=True)]
    assert [lost[place] for place in (*context, final)] == [0] * (len(context) + 1)
    assert (lost[analysis], lost[user]) == (fitted.analysis_tokens_cut, fitted.user_tokens_cut)
    # No more is cut than needed, but for the rest of a character (at most 3 bytes) on each side of a cut.
    assert seq_len - (len(cut) + 1) <= 3
    if lost[user]:
        assert len(cut.messages[analysis].content) == 0


@pytest.mark.parametrize(
    ("shorter_by", "branch", "analysis_cut", "user_cut"),
    [
        (0, "whole", 0, 0),
        (1, "analysis_cut", 1, 0),
        (20, "analysis_cut", 20, 0),
        (21, "analysis_emptied", 21, 0),
        (22, "user_cut", 21, 1),
        (41, "user_cut", 21, 20),
        (42, "user_emptied", 21, 21),
        (43, "dropped_context_too_long", 0, 0),
    ],
)
def test_each_branch_at_its_border(
    full: Tokenizer, shorter_by: int, branch: str, analysis_cut: int, user_cut: int
) -> None:
    whole = FastRenderer(full).render(MESSAGES)
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
