"""Multiplication by one digit, and sums of more terms or more digits: the written methods, a column a line."""

from __future__ import annotations

import random

from vpmoe.data_curation.tasks.digits import PLACES, SUM
from vpmoe.data_curation.tasks.family import DrawnFamily, Instance, ListedFamily, Worked, spelled

_MULTIPLY = {
    "en": ("What is {a} × {b}?", "Multiply {a} by {b}."),
    "de": ("Was ist {a} × {b}?", "Multipliziere {a} mit {b}."),
    "fr": ("Combien font {a} × {b} ?", "Multiplie {a} par {b}."),
}
_PRODUCT = {"en": "product", "de": "Produkt", "fr": "produit"}
_ADD_ALL = {
    "en": ("What is {}?", "Work out {}."),
    "de": ("Was ist {}?", "Rechne {} aus."),
    "fr": ("Combien font {} ?", "Calcule {}."),
}
_TERMS = {"3 digits": (2, 100, 999), "3 terms": (3, 10, 99), "4 terms": (4, 10, 99)}


def _multiply(operands: Instance, rng: random.Random, language: str) -> Worked:
    number, digit = operands
    lines, carry = [f"{spelled(number)}×{digit}"], 0
    for place, own in zip(PLACES[language], reversed(str(number)), strict=False):
        column = int(own) * digit + carry
        lines.append(f"{place} {own}×{digit}+{carry}={spelled(column, 2)}")
        carry = column // 10
    lines.append(f"{_PRODUCT[language]} {spelled(number * digit, len(str(number)) + 1)}")
    a, b = rng.sample(operands, 2)
    return Worked(rng.choice(_MULTIPLY[language]).format(a=a, b=b), "\n".join(lines), str(number * digit))


def _draw_terms(level: str, rng: random.Random) -> Instance:
    count, least, most = _TERMS[level]
    return tuple(sorted(rng.randint(least, most) for _ in range(count)))


def _add_all(instance: Instance, rng: random.Random, language: str) -> Worked:
    terms = rng.sample(instance[1:], len(instance) - 1)
    width = len(str(terms[0]))
    lines, carry = ["+".join(map(spelled, terms))], 0
    for place in range(width):
        digits = [term // 10**place % 10 for term in terms]
        column = sum(digits) + carry
        lines.append(f"{PLACES[language][place]} {'+'.join(map(str, [*digits, carry]))}={spelled(column, 2)}")
        carry = column // 10
    lines.append(f"{SUM[language]} {spelled(sum(terms), width + 1)}")
    query = rng.choice(_ADD_ALL[language]).format(" + ".join(map(str, terms)))
    return Worked(query, "\n".join(lines), str(sum(terms)))


_FACTORS = tuple((number, digit) for number in range(10, 1000) for digit in range(2, 10))

MULTIPLICATION = ListedFamily(
    "multiplication", ("2 digits", "3 digits"), _multiply, _FACTORS, lambda factors: f"{len(str(factors[0]))} digits"
)
LONG_ADDITION = DrawnFamily("long_addition", tuple(_TERMS), _add_all, _draw_terms)
