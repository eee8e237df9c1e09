"""The student's code for ``transformers``: padding-free and padded rows, positions, and what contradicts them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.data import DataCollatorWithFlattening

from tests.tiny_hf_student import GREEDY, KINDS, ROWS, alone, flat, model_of, tokens
from vpmoe.hf.modeling_vpmoe import VpMoeForCausalLM


@pytest.fixture(scope="module")
def model() -> VpMoeForCausalLM:
    return model_of()


@pytest.mark.parametrize("mask", ["none", "ones"])
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_documents_of_a_row_are_as_if_alone(kind: str, cached: bool, mask: str) -> None:
    model = model_of(kind)
    ids, positions = flat(ROWS)
    given = None if mask == "none" else torch.ones_like(ids)
    with torch.no_grad():
        together = model(ids, attention_mask=given, position_ids=positions, use_cache=cached).logits
    for logits, row in zip(together, ROWS, strict=True):
        expected = torch.cat([alone(model, document) for document in row])
        assert expected.abs().max() > 0.5
        torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)


def test_the_cache_goes_on_with_the_last_document(model: VpMoeForCausalLM) -> None:
    """In pieces of several lengths, over the window and over a restart."""
    ids, positions = flat([[*ROWS[0], tokens(8, 7)]])
    expected = torch.cat([alone(model, document) for document in [*ROWS[0], tokens(8, 7)]])
    for sizes in ([3, 5, 8, 8], [1] * 24, [13, 1, 2, 1, 7]):
        cache, found = DynamicCache(config=model.config), []
        for piece, places in zip(ids.split(sizes, 1), positions.split(sizes, 1), strict=True):
            with torch.no_grad():
                found.append(model(piece, position_ids=places, past_key_values=cache).logits[0])
        torch.testing.assert_close(torch.cat(found), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match=r"several documents.*position_ids"):
        model(ids[:, :1], past_key_values=cache)
    with pytest.raises(ValueError, match="have 24 at new token 0; 8 or 0"):  # what `generate` fills in
        model.generate(torch.cat([ids, ids[:, :1]], 1), past_key_values=cache, **GREEDY)


@pytest.mark.parametrize("cached", [False, True])
def test_generation_after_packed_documents(model: VpMoeForCausalLM, cached: bool) -> None:
    ids, positions = flat([ROWS[0]])
    continued: Any = model.generate(ids, position_ids=positions, use_cache=cached, **GREEDY)
    expected: Any = model.generate(torch.tensor([ROWS[0][-1]]), use_cache=cached, **GREEDY)
    assert continued[0, ids.shape[1] :].tolist() == expected[0, len(ROWS[0][-1]) :].tolist()


def test_a_flattened_batch_has_the_loss_of_its_documents(model: VpMoeForCausalLM) -> None:
    documents = [tokens(9, 1), tokens(2, 2), tokens(6, 3)]
    batch: Any = DataCollatorWithFlattening(return_tensors="pt")([{"input_ids": d} for d in documents])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    total = sum(functional.cross_entropy(alone(model, d)[:-1], torch.tensor(d[1:]), reduction="sum") for d in documents)
    torch.testing.assert_close(model(**batch).loss, total / 14)
    torch.testing.assert_close(model(**batch, num_items_in_batch=torch.tensor(7)).loss, total / 7)


@pytest.mark.parametrize("cached", [False, True])
def test_padding_anywhere_makes_no_difference(model: VpMoeForCausalLM, cached: bool) -> None:
    """On the left, on the right, inside and between documents: what padding holds and its positions do not count."""
    first, second = tokens(5, 1), tokens(7, 2)
    ids = torch.tensor([[3, 3, 3, *second, 3, 3], [*first[:2], 3, *first[2:], 3, 3, 3, *second[:3]]])
    real = torch.tensor([[0] * 3 + [1] * 7 + [0] * 2, [1, 1, 0, 1, 1, 1, 0, 0, 0, 1, 1, 1]])
    positions = torch.tensor([[9, 0, 9, *range(7), 0, 1], [0, 1, 5, 2, 3, 4, 9, 9, 0, 0, 1, 2]])
    with torch.no_grad():
        logits = model(ids, attention_mask=real, position_ids=positions, use_cache=cached).logits
    torch.testing.assert_close(logits[0, 3:10], alone(model, second), rtol=1e-5, atol=1e-5)
    expected = torch.cat([alone(model, first), alone(model, second[:3])])
    torch.testing.assert_close(logits[1][real[1].bool()], expected, rtol=1e-5, atol=1e-5)


def test_positions_given_as_generate_gives_them(model: VpMoeForCausalLM) -> None:
    ids = torch.tensor([[0] * 4 + tokens(4, 1), tokens(8, 2)])
    real = torch.tensor([[0] * 4 + [1] * 4, [1] * 8])
    positions = (real.cumsum(1) - 1).masked_fill(real == 0, 1)
    for given in (None, positions):
        logits = model(ids, attention_mask=real, position_ids=given).logits
        torch.testing.assert_close(logits[0, 4:], alone(model, tokens(4, 1)), rtol=1e-5, atol=1e-5)


CONTRADICTIONS: dict[str, dict[str, Any]] = {
    r"position_ids of row 0 have 2 at new token 1; 1 or 0 is needed after 1 real": {"position_ids": [[0, 2, 3, 4]]},
    r"row 0 have 1 at new token 0; 0 is needed": {"position_ids": [[1, 0, 1, 2]]},
    r"row 0 have 5 at new token 0; 0 is needed after 0": {"position_ids": [[5, 6, 7, 8]]},
    r"row 0 have -1 at new token 2; 2 or 0": {"position_ids": [[0, 1, -1, 0]]},
    r"row 1 have 2 at new token 3; 1 or 0": {"position_ids": [[0, 1, 2, 3], [0, 1, 0, 2]]},
    # The mask says that the row begins later, or has a gap, than the positions say.
    r"row 0 have 2 at new token 2; 0 is": {"position_ids": [[0, 1, 2, 3]], "attention_mask": [[0, 0, 1, 1]]},
    r"row 0 have 3 at new token 3; 2 or 0": {"position_ids": [[0, 1, 2, 3]], "attention_mask": [[1, 1, 0, 1]]},
    r"row 0 have 1 at new token 3; 2 or 0": {"position_ids": [[0, 1, 0, 1]], "attention_mask": [[1, 1, 0, 1]]},
    r"position_ids have shape \[1, 3\]; \[1, 4\]": {"position_ids": [[0, 1, 2]]},
    r"attention_mask has other values than 0 .*position_ids": {"attention_mask": [[1, 1, 2, 2]]},
    r"attention_mask has shape \[1, 3\]; \[1, 4\]": {"attention_mask": [[1, 1, 1]]},
    r"attention_mask has shape \[1, 1, 4, 4\]": {"attention_mask": [torch.ones(1, 4, 4).tolist()]},
}


@pytest.mark.parametrize("told", CONTRADICTIONS)
def test_contradictions_are_refused(model: VpMoeForCausalLM, told: str) -> None:
    given = {name: torch.tensor(value) for name, value in CONTRADICTIONS[told].items()}
    rows = len(given.get("position_ids", [0]))
    with pytest.raises(ValueError, match=told):
        model(torch.tensor([tokens(4)] * rows), **given)


def test_positions_that_the_cache_contradicts_are_refused(model: VpMoeForCausalLM) -> None:
    def step(positions: list[int]) -> None:
        cache = DynamicCache(config=model.config)
        model(torch.tensor([tokens(3)]), past_key_values=cache)
        model(torch.tensor([tokens(2)]), past_key_values=cache, position_ids=torch.tensor([positions]))

    for right in ([3, 4], [3, 0], [0, 1], [0, 0]):
        step(right)
    for wrong in ([4, 5], [2, 3], [2, 0], [1, 3], [-1, 0]):
        with pytest.raises(ValueError, match=rf"row 0 have {wrong[0]} at new token 0; 3 or 0 is needed after 3 real"):
            step(wrong)


def test_padding_that_drove_tokens_out_of_the_cache_is_refused(model: VpMoeForCausalLM) -> None:
    """The local layers' cache holds the last places of a row; a row padded on the right needs earlier ones."""
    ids = torch.tensor([tokens(6, 1), tokens(3, 2) + [0] * 3])
    real = torch.tensor([[1] * 6, [1] * 3 + [0] * 3])
    following, all_real = torch.tensor([[7], [8]]), torch.cat([real, torch.ones(2, 1, dtype=real.dtype)], 1)
    cache = DynamicCache(config=model.config)
    model(ids, attention_mask=real, past_key_values=cache)
    with pytest.raises(ValueError, match="pad on the left"):
        model(following, attention_mask=all_real, past_key_values=cache)
    whole = DynamicCache()  # keeps every key of every layer
    model(ids, attention_mask=real, past_key_values=whole)
    logits = model(following, attention_mask=all_real, past_key_values=whole).logits
    torch.testing.assert_close(logits[1, 0], alone(model, [*tokens(3, 2), 8])[-1], rtol=1e-5, atol=1e-5)
