"""splitmix64 as its paper has it, with Python's integers: Steele, Lea and Flood, "Fast splittable pseudorandom number
generators", 2014; and a normal number of 16 of its bits.
"""

from __future__ import annotations

from statistics import NormalDist

MASK = 2**64 - 1


def outputs(state: int, count: int) -> list[int]:
    """The first outputs, 64 unsigned bits each, of the generator that begins with ``state``."""
    found = []
    for _ in range(count):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def normals(state: int, count: int) -> list[float]:
    """Quantiles, at the middles of 65,536 equal steps of probability, of each 16 bits of the outputs, lowest first.

    Their variance is that of the steps' middles, 0.99998.
    """
    words = outputs(state, -(-count // 4))
    lanes = [word >> shift & 0xFFFF for word in words for shift in (0, 16, 32, 48)]
    return [NormalDist().inv_cdf((lane + 0.5) / 65536) for lane in lanes[:count]]
