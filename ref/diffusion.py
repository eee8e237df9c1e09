"""Gaussian diffusion as its papers write it, one number at a time with Python's floats: noise is what is predicted.

Ho, Jain and Abbeel 2020 (arXiv 2006.11239): steps q(x_t | x_{t-1}) = N(sqrt(1 - b_t) x_{t-1}, b_t). Nichol and
Dhariwal 2021 (arXiv 2102.09672): b_t from a cosine. Song, Meng and Ermon 2021 (arXiv 2010.02502): DDIM, equation 12
with sigma 0.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence


def betas(levels: int) -> list[float]:
    """b_1 to b_T."""
    found = []
    for t in range(1, levels + 1):
        here = math.cos((t / levels + 0.008) / 1.008 * math.pi / 2) ** 2
        before = math.cos(((t - 1) / levels + 0.008) / 1.008 * math.pi / 2) ** 2
        found.append(min(1 - here / before, 0.999))
    return found


def diffused(x0: float, fresh_noise: Sequence[float]) -> float:
    """x_t by t steps of the chain, each with its own noise."""
    x = x0
    levels = len(fresh_noise)
    for beta, noise in zip(betas(levels), fresh_noise, strict=True):
        x = math.sqrt(1 - beta) * x + math.sqrt(beta) * noise
    return x


def alpha_bar(t: int, levels: int) -> float:
    """The product of 1 - b_1 to 1 - b_t."""
    return math.prod(1 - beta for beta in betas(levels)[:t])


def ddim(x: float, path: Sequence[int], levels: int, predicted_noise: Callable[[float, int], float]) -> float:
    """From x at level ``path[0]`` along the path to its last level."""
    for t, s in itertools.pairwise(path):
        at, here = alpha_bar(s, levels), alpha_bar(t, levels)
        noise = predicted_noise(x, t)
        predicted_x0 = (x - math.sqrt(1 - here) * noise) / math.sqrt(here)
        x = math.sqrt(at) * predicted_x0 + math.sqrt(1 - at) * noise
    return x
