"""String manipulation on made-up words: reversing, replacing a letter, shifting letters in the alphabet."""

from __future__ import annotations

import random

from vpmoe.data_curation.tasks.family import DrawnFamily, Instance, Worked, spaced

_LEVELS = ("replace", "reverse", "shift")
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_QUERIES = {
    "en": {
        "replace": ("Replace every {old} by {new} in {word}.", "Write {word} with {new} for each {old}."),
        "reverse": ("Write {word} backwards.", "What is {word} from back to front?"),
        "shift": (
            "Shift every letter of {word} by {old} in the alphabet.",
            "Write {word} with every letter {old} further in the alphabet.",
        ),
    },
    "de": {
        "replace": ("Ersetze in {word} jedes {old} durch {new}.", "Schreibe {word} mit {new} für jedes {old}."),
        "reverse": ("Schreibe {word} rückwärts.", "Was ist {word} von hinten nach vorn?"),
        "shift": (
            "Verschiebe jeden Buchstaben von {word} um {old} im Alphabet.",
            "Schreibe {word} mit jedem Buchstaben {old} weiter im Alphabet.",
        ),
    },
    "fr": {
        "replace": ("Remplace chaque {old} par {new} dans {word}.", "Écris {word} avec {new} pour chaque {old}."),
        "reverse": ("Écris {word} à l'envers.", "Que donne {word} lu de la fin au début ?"),
        "shift": (
            "Décale chaque lettre de {word} de {old} dans l'alphabet.",
            "Écris {word} avec chaque lettre {old} plus loin dans l'alphabet.",
        ),
    },
}


def _draw(level: str, rng: random.Random) -> Instance:
    """``(word, old, new)``; a shift is by ``old`` places, reversing needs neither."""
    if level == "replace":
        few = rng.sample(_LETTERS, 3)
        word = "".join(rng.choices(few, k=rng.randint(5, 8)))
        return word, rng.choice(word), rng.choice([letter for letter in _LETTERS if letter not in few])
    word = "".join(rng.choices(_LETTERS, k=rng.randint(4, 8)))
    return word, str(rng.randint(1, 3)) if level == "shift" else "", ""


def _work(instance: Instance, rng: random.Random, language: str) -> Worked:
    level, word, old, new = instance
    lines = [spaced(word)]
    if level == "reverse":
        # The last letter moves over, one a line.
        lines += [f"{spaced(word[:-step])} | {spaced(word[: -step - 1 : -1])}" for step in range(1, len(word))]
        result = word[::-1]
    else:
        letters = [_shifted(own, int(old)) if level == "shift" else own for own in word]
        letters = [new if level == "replace" and own == old else own for own in letters]
        lines += [f"{' '.join(_path(own, became, level))}" for own, became in zip(word, letters, strict=True)]
        result = "".join(letters)
    lines.append(spaced(result))
    query = rng.choice(_QUERIES[language][level]).format(word=word, old=old, new=new)
    return Worked(query, "\n".join(lines), result)


def _path(own: str, became: str, level: str) -> list[str]:
    """A letter and what it becomes; a shift passes every letter between."""
    path = [own]
    while level == "shift" and path[-1] != became:
        path.append(_shifted(path[-1], 1))
    return path if level == "shift" else [own, became]


def _shifted(letter: str, places: int) -> str:
    return _LETTERS[(_LETTERS.index(letter) + places) % len(_LETTERS)]


STRINGS = DrawnFamily("strings", _LEVELS, _work, _draw)
