"""Conversion of units: from a larger to a smaller one, from two to one, and back."""

from __future__ import annotations

import random

from vpmoe.data_curation.tasks.family import DrawnFamily, Instance, Worked

_PAIRS = (
    ("h", "min", 60),
    ("min", "s", 60),
    ("cm", "mm", 10),
    ("m", "cm", 100),
    ("km", "m", 1000),
    ("kg", "g", 1000),
    ("t", "kg", 1000),
    ("l", "ml", 1000),
)
_MOST = {"one unit": 499, "two units": 99, "back": 99}
_QUERIES = {
    "en": ("How many {to} are {given}?", "Convert {given} to {to}."),
    "de": ("Wie viele {to} sind {given}?", "Rechne {given} in {to} um."),
    "fr": ("Combien de {to} font {given} ?", "Convertis {given} en {to}."),
}
_AND = {"en": "and", "de": "und", "fr": "et"}


def _draw(level: str, rng: random.Random) -> Instance:
    larger, smaller, factor = rng.choice(_PAIRS)
    return larger, smaller, factor, rng.randint(2, _MOST[level]), 0 if level == "one unit" else rng.randrange(1, factor)


def _convert(instance: Instance, rng: random.Random, language: str) -> Worked:
    level, larger, smaller, factor, whole, rest = instance
    both, total = f"{whole} {larger} {rest} {smaller}", whole * factor + rest
    lines = [f"1 {larger} = {factor} {smaller}"]
    if level == "back":
        lines += [
            f"{whole} × {factor} = {whole * factor}",
            f"{whole + 1} × {factor} = {whole * factor + factor} > {total}",
            f"{total} - {whole * factor} = {rest}",
            both,
        ]
        given, to, answer = f"{total} {smaller}", f"{larger} {_AND[language]} {smaller}", both
    else:
        lines += _product(whole, factor)
        if rest:
            lines.append(f"{whole * factor} + {rest} = {total}")
        lines.append(f"{total} {smaller}")
        given, to, answer = both if rest else f"{whole} {larger}", smaller, str(total)
    return Worked(rng.choice(_QUERIES[language]).format(to=to, given=given), "\n".join(lines), answer)


def _product(whole: int, factor: int) -> list[str]:
    """``whole * factor``: digits by the six of a 60 first, zeros behind."""
    if factor != 60:
        return [f"{whole} × {factor} = {whole * factor}"]
    parts = [int(digit) * 10**place for place, digit in enumerate(reversed(str(whole))) if digit != "0"][::-1]
    lines = [f"{part} × 6 = {part * 6}" for part in parts]
    if len(parts) > 1:
        lines.append(f"{' + '.join(str(part * 6) for part in parts)} = {whole * 6}")
    return [*lines, f"{whole * 6} × 10 = {whole * 60}"]


UNITS = DrawnFamily("units", tuple(_MOST), _convert, _draw)
