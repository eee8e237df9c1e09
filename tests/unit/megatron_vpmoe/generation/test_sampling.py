"""Draws come from the distribution asked for, and from nothing but (seed, prompt, sample, position)."""

from __future__ import annotations

import pytest
import torch

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.generation.sampling import SamplingOptions, choose

PROBABILITIES = torch.tensor([0.05, 0.5, 0.15, 0.3])
EVEN = (torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000


def shares(**options: float) -> list[float]:
    """Of each token, over uniform numbers that are spread evenly."""
    chosen = choose(PROBABILITIES.log().repeat(len(EVEN), 1), SamplingOptions(1, (), **options), EVEN)  # type: ignore[arg-type]
    found = chosen.token.bincount(minlength=4) / len(EVEN)
    torch.testing.assert_close(chosen.untempered, PROBABILITIES.log()[chosen.token])
    if options.get("temperature"):
        torch.testing.assert_close(chosen.as_sampled.exp(), found[chosen.token], rtol=0, atol=1e-4)
    return found.tolist()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 1.0}, [0.05, 0.5, 0.15, 0.3]),
        ({"temperature": 1.0, "top_p": 0.75}, [0, 0.625, 0, 0.375]),
        ({"temperature": 1.0, "top_p": 1e-6}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_k": 3}, [0, 0.5 / 0.95, 0.15 / 0.95, 0.3 / 0.95]),
        ({"temperature": 1.0, "top_k": 9}, [0.05, 0.5, 0.15, 0.3]),
        ({"temperature": 1.0, "min_p": 0.31}, [0, 0.625, 0, 0.375]),
        ({"temperature": 1.0, "top_k": 3, "top_p": 0.52, "min_p": 0.2}, [0, 1, 0, 0]),
        ({"temperature": 2.0}, (PROBABILITIES.sqrt() / PROBABILITIES.sqrt().sum()).tolist()),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_filters(options: dict[str, float], expected: list[float]) -> None:
    assert shares(**options) == pytest.approx(expected, abs=1e-4)


def test_what_is_not_allowed_is_not_drawn() -> None:
    logits = PROBABILITIES.log().repeat(3, 1)
    allowed = torch.tensor([[True, False, True, True], [True, False, False, False], [False, True, False, True]])
    ends = torch.tensor([1 - 2.0**-53, 0.0, 1 - 2.0**-53], dtype=torch.float64)
    drawn = choose(logits, SamplingOptions(1, (), temperature=1.0), ends, allowed)
    assert drawn.token.tolist() == [3, 0, 3]
    torch.testing.assert_close(drawn.as_sampled.exp(), torch.tensor([0.6, 1.0, 0.375]))
    greedy = choose(logits, SamplingOptions(1, ()), ends, allowed)
    assert greedy.token.tolist() == [3, 0, 1] and greedy.as_sampled.tolist() == [0, 0, 0]


def test_a_distribution_of_one_at_the_far_end_of_a_large_vocabulary() -> None:
    logits = torch.full((2, 201_088), -60.0)
    logits[:, -1] = 0.0
    ends = torch.tensor([1e-12, 1 - 2.0**-53], dtype=torch.float64)
    drawn = choose(logits, SamplingOptions(1, (), temperature=1.0), ends)
    assert drawn.token.tolist() == [201_087] * 2 and drawn.as_sampled.exp().tolist() == [1, 1]


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"temperature": 1e-40},
        {"top_p": 0.0},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"top_k": 0},
        {"min_p": 1.1},
        {"samples": 0},
    ],
)
def test_unusable_options(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match="sampling options"):
        SamplingOptions(**{"max_new_tokens": 4, "stop_ids": (), **wrong})  # pyright: ignore[reportArgumentType]
