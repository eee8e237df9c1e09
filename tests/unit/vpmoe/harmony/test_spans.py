"""Spans and their alignment: what is supervised, and where the signal is stored."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe.errors import HarmonyError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.harmony.spans import aligned_to_labels, documents, loss_mask, span_of_message
from vpmoe.tokenizer.interface import Tokenizer

MESSAGES = (
    Message("system", "Reasoning: low"),
    Message("user", "2 + 2?"),
    Message("assistant", "2+2=4", "analysis"),
    Message("assistant", "4", "final"),
)


def test_wrapper_tokens_belong_to_their_message_and_the_separator_to_none(tokenizer: Tokenizer) -> None:
    tokens, span, _ = documents((FastRenderer(tokenizer).render(MESSAGES),), tokenizer.eod_id)
    assert (tokens.dtype, span.dtype, len(tokens)) == (np.int32, np.uint8, len(span))
    of_span = {value: tokenizer.decode(tokens[span == value]) for value in (0, 1, 2)}
    assert (
        of_span[0]
        == "<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>2 + 2?<|end|><|endoftext|>"
    )
    assert of_span[1] == "<|start|>assistant<|channel|>analysis<|message|>2+2=4<|end|>"
    assert of_span[2] == "<|start|>assistant<|channel|>final<|message|>4<|return|>"


@given(documents=st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=5))
def test_alignment_shifts_within_each_document(documents: list[list[int]]) -> None:
    flat = np.array([span for spans in documents for span in spans], dtype=np.uint8)
    aligned = aligned_to_labels(flat, np.array([len(spans) for spans in documents]))
    expected = [span for spans in documents for span in [*spans[1:], 0]]
    assert aligned.dtype == np.uint8 and aligned.tolist() == expected
    assert loss_mask(aligned).tolist() == [int(span > 0) for span in expected]


def test_a_channel_without_a_span_is_refused() -> None:
    assert span_of_message("user", None) == 0
    with pytest.raises(HarmonyError, match="commentary"):
        span_of_message("assistant", "commentary")
