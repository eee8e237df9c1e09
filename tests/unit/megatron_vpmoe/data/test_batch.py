"""The batch: labels stay inside a conversation, positions restart, padding is nothing, boundaries are right."""

from __future__ import annotations

import numpy as np
import pytest

from megatron_vpmoe.data.batch import PADDING, Batch, Document, Span, assemble
from megatron_vpmoe.errors import DataError
from tests.fixtures_dataset import EOD, conversation


def two_rows(seq_length: int = 40) -> tuple[Batch, list[list[Document]]]:
    rows = [[conversation(12, 0), conversation(16, 1), conversation(9, 2)], [conversation(20, 3)]]
    return assemble(rows, seq_length=seq_length, eod_id=EOD, sample_ids=[7, 8]), rows


def test_every_conversation_is_there_with_its_own_labels_masks_and_positions():
    batch, rows = two_rows()
    for row, documents in enumerate(rows):
        for number, document in enumerate(documents):
            where = batch.document_id[row] == number
            length = len(document.tokens)
            assert batch.tokens[row, where].tolist() == document.tokens.tolist()
            assert batch.labels[row, where].tolist() == [*document.tokens[1:].tolist(), EOD]
            assert batch.position_ids[row, where].tolist() == list(range(length))
            assert batch.loss_mask[row, where].tolist() == document.loss_mask.astype(bool).tolist()
            assert batch.span_id[row, where].tolist() == document.span_id.tolist()


def test_padding_is_masked_and_unnumbered():
    batch, _ = two_rows()
    padding = batch.document_id == PADDING
    assert padding.sum() == 80 - 57
    assert batch.real_tokens == 57
    assert (batch.tokens[padding] == EOD).all() and (batch.labels[padding] == EOD).all()
    assert not batch.loss_mask[padding].any() and not batch.span_id[padding].any()
    assert (batch.position_ids[padding] == 0).all()


def test_the_last_label_is_unsupervised_even_if_the_sidecar_says_otherwise():
    document = conversation(10, 0)
    wrong = Document(document.tokens, np.ones(10, np.uint8), np.full(10, 2, np.uint8))
    batch = assemble([[wrong, wrong]], seq_length=20, eod_id=EOD, sample_ids=[0])
    assert batch.loss_mask[0].tolist() == ([True] * 9 + [False]) * 2
    assert batch.span_id[0, [9, 19]].tolist() == [0, 0]


def test_span_count_is_of_supervised_labels():
    document = conversation(16, 0)
    silent = Document(document.tokens, np.zeros(16, np.uint8), document.span_id)
    batch = assemble([[document, silent]], seq_length=40, eod_id=EOD, sample_ids=[0])
    assert batch.span_count(Span.ANALYSIS) == int((document.span_id == 1).sum()) > 0
    assert batch.span_count(Span.FINAL) == int((document.span_id == 2).sum()) > 0
    assert batch.span_count(Span.CONTEXT) == 0


def test_an_empty_row_is_padding_alone():
    batch = assemble([[]], seq_length=8, eod_id=EOD, sample_ids=[PADDING])
    assert batch.real_tokens == 0 and not batch.loss_mask.any()


def test_conversations_that_do_not_fit_are_refused():
    with pytest.raises(DataError, match="21 tokens do not fit into a row of 20"):
        assemble([[conversation(12, 0), conversation(9, 0)]], seq_length=20, eod_id=EOD, sample_ids=[3])


def test_the_prompt_ends_before_the_first_assistant_token():
    document = conversation(16, 0)
    assert document.prompt.tolist() == document.tokens[:8].tolist()
    plain = Document(document.tokens, np.ones(16, np.uint8), np.zeros(16, np.uint8))
    assert plain.prompt.tolist() == document.tokens.tolist()
