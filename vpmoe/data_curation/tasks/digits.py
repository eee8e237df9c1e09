"""Addition, subtraction, comparison and sorting of small numbers, digit by digit.

Numbers of up to three digits are single tokens of o200k, which say nothing of their digits. Every derivation therefore
spells the digits apart first, works on digits, and ends with the result's digits apart: each token it asks for follows
from a few tokens near by, and a small model can learn the method instead of the table.
"""

from __future__ import annotations

import random
from itertools import combinations_with_replacement

from vpmoe.data_curation.tasks.family import Instance, ListedFamily, Worked, spaced, spelled

_ADD = {
    "en": ("What is {a} + {b}?", "Add {a} and {b}."),
    "de": ("Was ist {a} + {b}?", "Addiere {a} und {b}."),
    "fr": ("Combien font {a} + {b} ?", "Additionne {a} et {b}."),
}
_SUBTRACT = {
    "en": ("What is {a} - {b}?", "Subtract {b} from {a}."),
    "de": ("Was ist {a} - {b}?", "Subtrahiere {b} von {a}."),
    "fr": ("Combien font {a} - {b} ?", "Soustrais {b} de {a}."),
}
_LARGER = {
    "en": ("Which is larger, {a} or {b}?", "What is the maximum of {a} and {b}?"),
    "de": ("Was ist größer, {a} oder {b}?", "Was ist das Maximum von {a} und {b}?"),
    "fr": ("Lequel est le plus grand, {a} ou {b} ?", "Quel est le maximum de {a} et {b} ?"),
}
_SORT = {"en": "Sort the digits {}.", "de": "Sortiere die Ziffern {}.", "fr": "Trie les chiffres {}."}
PLACES = {
    "en": ("ones", "tens", "hundreds"),
    "de": ("Einer", "Zehner", "Hunderter"),
    "fr": ("unités", "dizaines", "centaines"),
}
SUM = {"en": "sum", "de": "Summe", "fr": "somme"}
_DIFFERENCE = {"en": ("borrow", "difference"), "de": ("geborgt", "Differenz"), "fr": ("retenue", "différence")}
_OR_LARGER = {"en": ("or", "larger"), "de": ("oder", "größer"), "fr": ("ou", "plus grand")}
_THEN_SORTED = {"en": ("then", "sorted"), "de": ("dann", "sortiert"), "fr": ("puis", "trié")}


def _add(operands: Instance, rng: random.Random, language: str) -> Worked:
    a, b = rng.sample(operands, 2)
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    ones_word, tens_word, _ = PLACES[language]
    ones = a_ones + b_ones
    carry = ones // 10
    reasoning = (
        f"{spelled(a)}+{spelled(b)}\n"
        f"{ones_word} {a_ones}+{b_ones}={spelled(ones, 2)}\n"
        f"{tens_word} {a_tens}+{b_tens}+{carry}={spelled(a_tens + b_tens + carry, 2)}\n"
        f"{SUM[language]} {spelled(a + b, 3)}"
    )
    return Worked(rng.choice(_ADD[language]).format(a=a, b=b), reasoning, str(a + b))


def _subtract(operands: Instance, rng: random.Random, language: str) -> Worked:
    b, a = operands
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    ones_word, tens_word, _ = PLACES[language]
    borrow_word, difference_word = _DIFFERENCE[language]
    borrow = int(a_ones < b_ones)
    reasoning = (
        f"{spelled(a)}-{spelled(b)}\n"
        f"{ones_word} {a_ones}-{b_ones} {borrow_word} {borrow}={a_ones - b_ones + 10 * borrow}\n"
        f"{tens_word} {a_tens}-{b_tens}-{borrow}={a_tens - b_tens - borrow}\n"
        f"{difference_word} {spelled(a - b, 2)}"
    )
    return Worked(rng.choice(_SUBTRACT[language]).format(a=a, b=b), reasoning, str(a - b))


def _larger(operands: Instance, rng: random.Random, language: str) -> Worked:
    a, b = rng.sample(operands, 2)
    (a_tens, a_ones), (b_tens, b_ones) = divmod(a, 10), divmod(b, 10)
    ones_word, tens_word, _ = PLACES[language]
    or_word, larger_word = _OR_LARGER[language]
    steps = [f"{spelled(a)} {or_word} {spelled(b)}", f"{tens_word} {a_tens}{_relation(a_tens, b_tens)}{b_tens}"]
    if a_tens == b_tens:
        steps.append(f"{ones_word} {a_ones}{_relation(a_ones, b_ones)}{b_ones}")
    steps.append(f"{larger_word} {spelled(max(a, b))}")
    return Worked(rng.choice(_LARGER[language]).format(a=a, b=b), "\n".join(steps), str(max(a, b)))


def _sort(operands: Instance, rng: random.Random, language: str) -> Worked:
    digits = rng.sample(operands, len(operands))
    then_word, sorted_word = _THEN_SORTED[language]
    left, steps = list(digits), [spaced(digits)]
    while len(left) > 1:
        least = min(left)
        left.remove(least)
        steps.append(f"{least} {then_word} {spaced(left)}")
    answer = spaced(sorted(digits))
    steps.append(f"{sorted_word} {answer}")
    return Worked(_SORT[language].format(spaced(digits)), "\n".join(steps), answer)


def _carry_level(operands: Instance) -> str:
    return "carry" if sum(number % 10 for number in operands) >= 10 else "no carry"


def _borrow_level(operands: Instance) -> str:
    return "borrow" if operands[1] % 10 < operands[0] % 10 else "no borrow"


def _tens_level(operands: Instance) -> str:
    return "same tens" if operands[0] // 10 == operands[1] // 10 else "tens differ"


def _relation(a: int, b: int) -> str:
    return "<" if a < b else ">" if a > b else "="


_TWO_DIGITS = range(10, 100)
_PAIRS = tuple((a, b) for a in _TWO_DIGITS for b in _TWO_DIGITS if a <= b)
_UNEQUAL_PAIRS = tuple((a, b) for a, b in _PAIRS if a < b)
_DIGITS = tuple(chosen for count in (3, 4) for chosen in combinations_with_replacement(range(10), count))

ADDITION = ListedFamily("addition", ("no carry", "carry"), _add, _PAIRS, _carry_level)
SUBTRACTION = ListedFamily("subtraction", ("no borrow", "borrow"), _subtract, _PAIRS, _borrow_level)
MAXIMUM = ListedFamily("maximum", ("tens differ", "same tens"), _larger, _UNEQUAL_PAIRS, _tens_level)
SORTING = ListedFamily("sorting", ("3 digits", "4 digits"), _sort, _DIGITS, lambda digits: f"{len(digits)} digits")
