"""The schedule and DDIM against the papers' own terms: steps of a chain, and a predicted noise."""

from __future__ import annotations

import itertools
import math
import random

import pytest
import torch
from torch import Tensor

from megatron_vpmoe.think.schedule import LARGEST_BETA, Schedule, signal_shares
from ref import diffusion


@pytest.mark.parametrize("levels", [1, 7, 100])
def test_shares_are_the_products_of_the_papers_steps(levels: int) -> None:
    shares = signal_shares(levels)
    assert shares == pytest.approx([diffusion.alpha_bar(t, levels) for t in range(levels + 1)], rel=1e-12)
    assert all(later < earlier for earlier, later in itertools.pairwise(shares))
    assert shares[-1] / shares[-2] == pytest.approx(1 - LARGEST_BETA)  # the last step is the one that is cut


def test_half_way_half_is_signal_and_at_the_end_next_to_nothing() -> None:
    assert signal_shares(100)[50] == pytest.approx(0.5, abs=0.01)
    assert signal_shares(100)[100] < 1e-6


def test_noised_has_the_variance_of_the_chain() -> None:
    """x_t in one step has the mean of the chain without noise, and the rest of a unit of variance."""
    levels = 20
    x = Schedule(levels, 5).noised(torch.ones(1, dtype=torch.float64), torch.zeros(1), torch.tensor([levels]))
    assert x.item() == pytest.approx(diffusion.diffused(1.0, [0.0] * levels), rel=1e-9)
    draw = random.Random(0)
    ends = [diffusion.diffused(0.0, [draw.gauss(0, 1) for _ in range(levels)]) for _ in range(4000)]
    signal, noise = Schedule(levels, 5).rates(torch.tensor([levels]), torch.float64)
    assert signal.item() ** 2 + noise.item() ** 2 == pytest.approx(1)
    assert sum(end**2 for end in ends) / len(ends) == pytest.approx(noise.item() ** 2, rel=0.06)


@pytest.mark.parametrize(("levels", "steps"), [(100, 10), (100, 1), (100, 100), (10, 3)])
def test_ddim_is_the_papers_with_noise_predicted(levels: int, steps: int) -> None:
    """A model of x_0 that hangs on x and level, asked once for x_0 and once for the noise."""
    schedule = Schedule(levels, steps)
    assert schedule.path[0] == levels and schedule.path[-1] == 0 and len(schedule.path) == steps + 1
    assert sorted(set(schedule.path), reverse=True) == list(schedule.path)

    def clean(x: float, level: int) -> float:
        return math.tanh(x + 0.01 * level)

    def estimate(x: Tensor, level: int) -> Tensor:
        return torch.tensor([clean(value, level) for value in x.tolist()], dtype=x.dtype)

    def predicted_noise(x: float, level: int) -> float:
        share = diffusion.alpha_bar(level, levels)
        return (x - math.sqrt(share) * clean(x, level)) / math.sqrt(1 - share)

    start = torch.tensor([-1.3, 0.2, 0.9], dtype=torch.float64)
    found = schedule.denoised(start, estimate)
    expected = [diffusion.ddim(x, schedule.path, levels, predicted_noise) for x in start.tolist()]
    assert found.tolist() == pytest.approx(expected, rel=1e-7)


def test_the_truth_leads_back_to_what_was_noised_and_every_step_lies_on_the_way() -> None:
    generator = torch.Generator().manual_seed(0)
    clean, noise = (torch.randn(2, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    for steps in (1, 2, 10):
        schedule = Schedule(100, steps)

        def estimate(x: Tensor, level: int, schedule: Schedule = schedule) -> Tensor:
            torch.testing.assert_close(x, schedule.noised(clean, noise, torch.full((2,), level)))
            return clean

        start = schedule.noised(clean, noise, torch.full((2,), 100))
        torch.testing.assert_close(schedule.denoised(start, estimate), clean)


@pytest.mark.parametrize(("levels", "steps"), [(10, 0), (10, 11), (0, 0)])
def test_steps_that_cannot_be(levels: int, steps: int) -> None:
    with pytest.raises(ValueError, match="steps over"):
        Schedule(levels, steps)
