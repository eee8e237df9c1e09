"""How noise is mixed in, level by level, and taken out again: the cosine schedule, and DDIM with estimates of what is
clean.

Level 0 is clean and level T all but pure noise: at level t a sample is x_t = sqrt(a_t) x_0 + sqrt(1 - a_t) e. A model
is asked for x_0. At level T, where x_t says nothing of it, the best answer is the mean of all x_0 that the context
allows; DDIM goes on from there to one of them.

Shapes: any, levels broadcast over the last dimension (channels).
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable

import torch
from torch import Tensor

OFFSET = 0.008
LARGEST_BETA = 0.999


@functools.lru_cache
def signal_shares(levels: int) -> tuple[float, ...]:
    """a_0 to a_T, the share of the variance that is signal: Nichol and Dhariwal 2021, arXiv 2102.09672, (17).

    cos²((t/T + s) / (1 + s) · π/2) over its value at 0, s = 0.008, as steps 1 - b_t with b_t at most 0.999.

    Args:
        levels: T.
    """

    def cosine(level: int) -> float:
        return math.cos((level / levels + OFFSET) / (1 + OFFSET) * math.pi / 2) ** 2

    shares = [1.0]
    for level in range(1, levels + 1):
        shares.append(shares[-1] * (1 - min(1 - cosine(level) / cosine(level - 1), LARGEST_BETA)))
    return tuple(shares)


@functools.lru_cache
def _rates(levels: int, device: torch.device) -> Tensor:
    # The first caller may be a sampler in inference mode; the tensor must serve training as well.
    with torch.inference_mode(False):
        share = torch.tensor(signal_shares(levels), dtype=torch.float64)
        return torch.stack([share, 1 - share], -1).sqrt().to(device)


class Schedule:
    """Levels 0 to T and what each does.

    Args:
        levels: T, at least 1.
        steps: of DDIM, from level T to 0; from 1 to T.
    """

    def __init__(self, levels: int, steps: int) -> None:
        if not 1 <= steps <= levels:
            raise ValueError(f"{steps} steps over {levels} levels")
        self.levels = levels
        self.path = tuple(-(-levels * left // steps) for left in range(steps, -1, -1))
        """The levels of DDIM, from T down to 0."""

    def rates(self, level: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """sqrt(a) and sqrt(1 - a) of int64 levels, [..., 1] each."""
        signal, noise = _rates(self.levels, level.device)[level].to(dtype).unbind(-1)
        return signal.unsqueeze(-1), noise.unsqueeze(-1)

    def noised(self, clean: Tensor, noise: Tensor, level: Tensor) -> Tensor:
        """x_t at each level, in the dtype of ``clean``."""
        signal_rate, noise_rate = self.rates(level, clean.dtype)
        return signal_rate * clean + noise_rate * noise

    def denoised(self, noise: Tensor, estimate: Callable[[Tensor, int], Tensor]) -> Tensor:
        """x_0 as DDIM finds it (Song, Meng and Ermon 2021, arXiv 2010.02502, with eta 0), in the dtype of ``noise``.

        Args:
            noise: x_T, standard normal.
            estimate: x_0 of x_t and t; asked once for each level of ``path`` but the last.
        """
        x, shares = noise, signal_shares(self.levels)
        for level, lower in itertools.pairwise(self.path):
            clean = estimate(x, level).to(noise.dtype)
            residue = (x - math.sqrt(shares[level]) * clean) / math.sqrt(1 - shares[level])
            x = math.sqrt(shares[lower]) * clean + math.sqrt(1 - shares[lower]) * residue
        return x
