"""The task families of synth_mini: their questions, a derivation of each answer, and how a question is worded.

Numbers of up to three digits are single tokens of o200k, which say nothing of their digits. Every derivation therefore
spells the digits apart first, works on digits, and ends with the result's digits apart: each token it asks for follows
from a few tokens near by, and a small model can learn the method instead of the table.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement

Operands = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Worked:
    """One question worked out: the SYNTH fields that differ between rows, and the level of difficulty."""

    query: str
    reasoning: str
    answer: str
    level: str


@dataclass(frozen=True, slots=True)
class Family:
    """A kind of task.

    Attributes:
        name: stored in the column ``exercise``.
        operands: every question of the family once, in a fixed order; questions that are the same but for the order of
            their operands are one.
        work: ``(operands, rng) -> Worked``; the rng chooses wording and order, never the answer.
    """

    name: str
    operands: tuple[Operands, ...]
    work: Callable[[Operands, random.Random], Worked]


def spelled(number: int, width: int = 0) -> str:
    """The number's digits with blanks between them, with leading zeros up to ``width`` digits."""
    return " ".join(f"{number:0{width}d}")


def _add(operands: Operands, rng: random.Random) -> Worked:
    a, b = rng.sample(operands, 2)
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    ones = a_ones + b_ones
    carry = ones // 10
    reasoning = (
        f"{spelled(a)}+{spelled(b)}\n"
        f"ones {a_ones}+{b_ones}={spelled(ones, 2)}\n"
        f"tens {a_tens}+{b_tens}+{carry}={spelled(a_tens + b_tens + carry, 2)}\n"
        f"sum {spelled(a + b, 3)}"
    )
    query = rng.choice((f"What is {a} + {b}?", f"Add {a} and {b}."))
    return Worked(query, reasoning, str(a + b), "carry" if carry else "no carry")


def _subtract(operands: Operands, rng: random.Random) -> Worked:
    b, a = operands
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    borrow = int(a_ones < b_ones)
    reasoning = (
        f"{spelled(a)}-{spelled(b)}\n"
        f"ones {a_ones}-{b_ones}={a_ones - b_ones + 10 * borrow} borrow {borrow}\n"
        f"tens {a_tens}-{b_tens}-{borrow}={a_tens - b_tens - borrow}\n"
        f"difference {spelled(a - b, 2)}"
    )
    query = rng.choice((f"What is {a} - {b}?", f"Subtract {b} from {a}."))
    return Worked(query, reasoning, str(a - b), "borrow" if borrow else "no borrow")


def _larger(operands: Operands, rng: random.Random) -> Worked:
    a, b = rng.sample(operands, 2)
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    steps = [f"{spelled(a)} or {spelled(b)}", f"tens {a_tens}{_relation(a_tens, b_tens)}{b_tens}"]
    if a_tens == b_tens:
        steps.append(f"ones {a_ones}{_relation(a_ones, b_ones)}{b_ones}")
    steps.append(f"larger {spelled(max(a, b))}")
    query = rng.choice((f"Which is larger, {a} or {b}?", f"What is the maximum of {a} and {b}?"))
    return Worked(query, "\n".join(steps), str(max(a, b)), "same tens" if a_tens == b_tens else "tens differ")


def _sort(operands: Operands, rng: random.Random) -> Worked:
    digits = rng.sample(operands, len(operands))
    left, steps = list(digits), [_spaced(digits)]
    while len(left) > 1:
        least = min(left)
        left.remove(least)
        steps.append(f"{least} then {_spaced(left)}")
    answer = _spaced(sorted(digits))
    query = f"Sort the digits {_spaced(digits)}."
    return Worked(query, "\n".join([*steps, f"sorted {answer}"]), answer, f"{len(digits)} digits")


def _relation(a: int, b: int) -> str:
    return "<" if a < b else ">" if a > b else "="


def _spaced(digits: Sequence[int]) -> str:
    return " ".join(map(str, digits))


_TWO_DIGITS = range(10, 100)
_PAIRS = tuple((a, b) for a in _TWO_DIGITS for b in _TWO_DIGITS if a <= b)
_UNEQUAL_PAIRS = tuple((a, b) for a, b in _PAIRS if a < b)
_DIGITS = tuple(chosen for count in (3, 4) for chosen in combinations_with_replacement(range(10), count))

FAMILIES = {
    family.name: family
    for family in (
        Family("addition", _PAIRS, _add),
        Family("subtraction", _PAIRS, _subtract),
        Family("maximum", _UNEQUAL_PAIRS, _larger),
        Family("sorting", _DIGITS, _sort),
    )
}
