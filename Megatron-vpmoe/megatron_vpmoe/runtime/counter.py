"""Random numbers by counter: a hash of a key and a place, with no state to carry.

What is drawn is the same alone, in a batch, in another order, on other ranks and after a resume; normal numbers also on
every device, to the bit.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_GOLDEN, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_WORD = (1 << 64) - 1
_LANE_BITS = 16
_LANES = 64 // _LANE_BITS


def draw_key(*parts: int) -> int:
    """What the draws of one thing start from, a signed 64-bit integer; a hash of what names it, such as seed, prompt
    and sample.
    """
    key = 0
    for part in parts:
        key = _mixed((key ^ (part & _WORD)) + _GOLDEN & _WORD)
    return _signed(key)


def random_bits(key: Tensor, place: Tensor) -> Tensor:
    """64 bits each, int64: splitmix64 (Steele, Lea and Flood 2014) of each key's stream at a place.

    Args:
        key: int64, of ``draw_key`` or of this function: then a key of its own for each place of a stream.
        place: int64 of a shape that broadcasts with it; from 0 for what is published of a seed.
    """
    x = key + (place + 1) * _signed(_GOLDEN)
    x = (x ^ _shifted(x, 30)) * _signed(_FIRST)
    x = (x ^ _shifted(x, 27)) * _signed(_SECOND)
    return x ^ _shifted(x, 31)


def uniform(key: Tensor, place: Tensor) -> Tensor:
    """fp64 in [0, 1), of ``random_bits``."""
    return _shifted(random_bits(key, place), 11).double() * 2.0**-53


def normal(key: Tensor, width: int) -> Tensor:
    """Standard normal numbers fp32 [..., width] of int64 keys [...]: the key's first places, four numbers a place.

    A number is the quantile of 16 bits: one of 65,536 equally likely values up to 4.17, of mean 0 and variance 1. They
    are looked up in one table, since logarithms and cosines come out otherwise on another device.
    """
    place = torch.arange(-(-width // _LANES), device=key.device)
    bits = random_bits(key.unsqueeze(-1), place).unsqueeze(-1)
    lane = torch.arange(_LANES, device=key.device) * _LANE_BITS
    return _quantiles(key.device)[(bits >> lane & (1 << _LANE_BITS) - 1).flatten(-2)[..., :width]]


@functools.lru_cache
def _quantiles(device: torch.device) -> Tensor:
    """fp32 [65,536], computed by the host whatever the device; ascending and symmetric."""
    # The first caller may be a sampler in inference mode; the tensor must serve training as well.
    with torch.inference_mode(False):
        middle = (torch.arange(1 << _LANE_BITS, dtype=torch.float64, device="cpu") + 0.5) / (1 << _LANE_BITS)
        quantile = torch.special.ndtri(middle)
        quantile = (quantile - quantile.flip(0)) / 2
        return (quantile / quantile.square().mean().sqrt()).float().to(device)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # int64's own shift fills with the sign


def _mixed(x: int) -> int:
    x = (x ^ (x >> 30)) * _FIRST & _WORD
    x = (x ^ (x >> 27)) * _SECOND & _WORD
    return x ^ (x >> 31)


def _signed(x: int) -> int:
    return x - (1 << 64) if x >> 63 else x
