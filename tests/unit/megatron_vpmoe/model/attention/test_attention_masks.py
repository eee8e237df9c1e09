"""The layout's masks against the sentence that defines them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_vpmoe.model.attention.masks import SequenceLayout, additive


def layout_of(*rows: list[int]) -> SequenceLayout:
    document_id = torch.tensor(rows, dtype=torch.int32)
    return SequenceLayout(document_id, torch.zeros_like(document_id, dtype=torch.int64))


def may_see(documents: list[int], i: int, j: int, window: int | None) -> bool:
    return documents[i] == documents[j] and i - j >= 0 and (window is None or i - j < window)


rows = st.lists(st.sampled_from([1, 2, 3, 5]), min_size=1, max_size=6).map(
    lambda lengths: [document for document, length in enumerate(lengths) for _ in range(length)]
)


def test_window_counts_the_query_itself() -> None:
    visible = layout_of([0] * 300).visible(128)[0, 0]
    for i in (0, 1, 126, 127, 128, 129, 299):
        assert visible[i].nonzero().flatten().tolist() == list(range(max(0, i - 127), i + 1))


@settings(max_examples=30)
@given(rows, st.integers(1, 7) | st.none())
def test_visible_is_the_definition(documents: list[int], window: int | None) -> None:
    keys = range(len(documents))
    visible = layout_of(documents).visible(window)[0, 0]
    expected = [[may_see(documents, i, j, window) for j in keys] for i in keys]
    assert visible.tolist() == expected


@settings(max_examples=30)
@given(rows, st.integers(1, 7))
def test_blocks_hold_every_visible_pair_and_no_other(documents: list[int], window: int) -> None:
    blocks = layout_of(documents).blocks_visible(window)[0]
    seen = {
        (block * window + int(q), (block - 1) * window + int(k))
        for block in range(blocks.shape[0])
        for q, k in blocks[block].nonzero()
    }
    keys = range(len(documents))
    expected = {(i, j) for i in keys for j in keys if may_see(documents, i, j, window)}
    assert {pair for pair in seen if pair[0] in keys} == expected
    assert blocks.any(-1).all(), "a row without a key would be NaN after the softmax"


def test_padding_sees_padding_only() -> None:
    visible = layout_of([-1, -1, 0, 0, -1]).visible(None)[0, 0]
    assert visible[2].tolist() == [False, False, True, False, False]
    assert visible[4].tolist() == [True, True, False, False, True]


def test_layers_share_one_mask() -> None:
    layout = layout_of([0, 0, 1])
    assert layout.visible(2) is layout.visible(2)
    assert layout.visible(2) is not layout.visible(None)


def test_additive_is_zero_or_minus_infinity() -> None:
    assert additive(torch.tensor([True, False])).tolist() == [0.0, -torch.inf]


def test_shapes_that_disagree_are_refused() -> None:
    with pytest.raises(ValueError, match=r"\[1, 3\] and \[1, 2\]"):
        SequenceLayout(torch.zeros(1, 3, dtype=torch.int32), torch.zeros(1, 2, dtype=torch.int64))
