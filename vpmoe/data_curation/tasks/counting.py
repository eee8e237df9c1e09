"""Counting how often a digit occurs in a list, with a running count."""

from __future__ import annotations

import random

from vpmoe.data_curation.tasks.family import DrawnFamily, Instance, Worked, spaced

_QUERIES = {
    "en": ("How many times does {digit} occur in {items}?", "Count the digit {digit} in {items}."),
    "de": ("Wie oft kommt {digit} in {items} vor?", "Zähle die Ziffer {digit} in {items}."),
    "fr": ("Combien de fois {digit} figure-t-il dans {items} ?", "Compte le chiffre {digit} dans {items}."),
}
_WORDS = {"en": ("yes", "no", "count"), "de": ("ja", "nein", "Anzahl"), "fr": ("oui", "non", "nombre")}
_LENGTHS = {"6 items": 6, "9 items": 9, "12 items": 12}


def _draw(level: str, rng: random.Random) -> Instance:
    digit = rng.randrange(10)
    often = rng.randint(0, _LENGTHS[level] // 2)
    items = [digit] * often + [rng.randrange(10) for _ in range(_LENGTHS[level] - often)]
    return digit, tuple(sorted(items))


def _count(instance: Instance, rng: random.Random, language: str) -> Worked:
    _, digit, items = instance
    yes, no, count_word = _WORDS[language]
    shuffled = rng.sample(items, len(items))
    lines, count = [], 0
    for item in shuffled:
        count += item == digit
        lines.append(f"{item} {yes if item == digit else no} {count}")
    lines.append(f"{count_word} {count}")
    query = rng.choice(_QUERIES[language]).format(digit=digit, items=spaced(shuffled))
    return Worked(query, "\n".join(lines), str(count))


COUNTING = DrawnFamily("counting", tuple(_LENGTHS), _count, _draw)
