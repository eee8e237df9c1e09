"""The denoiser and its sampling, one position, one head, one number of the schedule at a time, in fp64.

A pre-norm transformer whose norms and residual branches a level sets (Peebles and Xie 2023, arXiv 2212.09748). Clean
tokens go through it at level 0; a noisy guess of the next token goes through it at its own level, one position further,
and reads the clean ones. No shared code with the product.

Shapes: H hidden, L layers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ref import diffusion
from ref.attention import rotate
from ref.latent_attention import rms_norm

KeysValues = list[tuple[list[Tensor], list[Tensor]]]
"""Of each head, over the tokens so far."""


@dataclass(frozen=True)
class Denoiser:
    """Weights by the names of the product's parameters, and sizes."""

    weights: Mapping[str, Tensor]
    layers: int
    heads: int
    levels: int
    frequency: Tensor
    eps: float

    def waves(self, level: int, size: int) -> Tensor:
        """Sines and then cosines of the level, from a radian a level down to a radian over all levels."""
        half = math.ceil(size / 2)
        angles = [level * self.levels ** (-place / half) for place in range(half)]
        return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)][:size], dtype=torch.float64)

    def modulation(self, name: str, level: int, size: int) -> list[Tensor]:
        """The vectors that a level gives to a place."""
        flat = self.weights[f"{name}.weight"] @ self.waves(level, size) + self.weights[f"{name}.bias"]
        return list(flat.split(size))

    def heads_of(self, x: Tensor) -> list[Tensor]:
        """One vector a head."""
        return list(x.split(len(x) // self.heads))

    def layer(
        self, number: int, hidden: Tensor, position: int, level: int, read: KeysValues, *, is_clean: bool
    ) -> Tensor:
        """Behind one layer; a clean token first leaves its keys and values in ``read``."""
        prefix, size = f"layers.{number}.", len(hidden)
        shift, scale, gate, shift2, scale2, gate2 = self.modulation(f"{prefix}level_modulation", level, size)
        normed = rms_norm(hidden, self.weights[f"{prefix}input_layernorm.weight"], self.eps) * (1 + scale) + shift
        q, k, v = self.weights[f"{prefix}self_attention.linear_qkv.weight"].chunk(3)
        if is_clean:
            for (keys, values), key, value in zip(
                read, self.heads_of(k @ normed), self.heads_of(v @ normed), strict=True
            ):
                keys.append(rotate(key, position, self.frequency))
                values.append(value)
        taken = []
        for (keys, values), query in zip(read, self.heads_of(q @ normed), strict=True):
            turned = rotate(query, position, self.frequency)
            exponents = [torch.exp(turned @ key / math.sqrt(len(turned))) for key in keys]
            total = sum(exponents, torch.zeros((), dtype=torch.float64))
            taken.append(sum((e / total * value for e, value in zip(exponents, values, strict=True)), 0 * values[0]))
        attended = self.weights[f"{prefix}self_attention.linear_proj.weight"] @ torch.cat(taken)
        hidden = hidden + (1 + gate) * attended
        inner = rms_norm(hidden, self.weights[f"{prefix}pre_mlp_layernorm.weight"], self.eps) * (1 + scale2) + shift2
        gated, up = self.weights[f"{prefix}mlp.linear_fc1.weight"].chunk(2)
        activated = (gated @ inner) / (1 + torch.exp(-(gated @ inner))) * (up @ inner)
        return hidden + (1 + gate2) * (self.weights[f"{prefix}mlp.linear_fc2.weight"] @ activated)

    def estimate(self, noisy: Tensor, position: int, level: int, read: list[KeysValues]) -> Tensor:
        """x_0 of a noisy guess at ``position``, from the clean tokens before it."""
        hidden = noisy
        for number in range(self.layers):
            hidden = self.layer(number, hidden, position, level, read[number], is_clean=False)
        shift, scale = self.modulation("final_modulation", level, len(noisy))
        normed = rms_norm(hidden, self.weights["final_layernorm.weight"], self.eps) * (1 + scale) + shift
        return self.weights["estimate.weight"] @ normed

    def denoised(self, x: Sequence[Tensor], noise: Sequence[Tensor], path: Sequence[int]) -> list[Tensor]:
        """What DDIM makes of each position's noise behind each token of one document."""
        read: list[KeysValues] = [[([], []) for _ in range(self.heads)] for _ in range(self.layers)]
        found = []
        for t, token in enumerate(x):
            hidden = token
            for number in range(self.layers):
                hidden = self.layer(number, hidden, t, 0, read[number], is_clean=True)
            guess = noise[t]
            for level, lower in itertools.pairwise(path):
                here, below = (diffusion.alpha_bar(one, self.levels) for one in (level, lower))
                clean = self.estimate(guess, t + 1, level, read)
                predicted_noise = (guess - math.sqrt(here) * clean) / math.sqrt(1 - here)
                guess = math.sqrt(below) * clean + math.sqrt(1 - below) * predicted_noise
            found.append(guess)
        return found
