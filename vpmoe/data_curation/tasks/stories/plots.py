"""Every plot of the stories has a number; an index under a seed is one of them, and two indices are never the same.

A plot is one choice for everything that a long story tells: scene, who and how the two characters are, place, weather,
what is found or lost, how it ends. Its number in mixed radix is these choices, the scene in the lowest place, so that
scenes come equally often. What a story leaves to its wording is no part of the plot.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from vpmoe.data_curation.tasks.family import hash_of
from vpmoe.data_curation.tasks.stories.content import CHILD, Scene, content
from vpmoe.errors import DataError

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True, slots=True)
class Character:
    """One of the two of a story."""

    name: str
    kind: str
    female: bool


@dataclass(frozen=True, slots=True)
class Plot:
    """What a story tells.

    Attributes:
        scene: what happens.
        hero: the protagonist, of a ``size`` and a ``trait``.
        friend: the other one, of the other gender and of another kind.
        elder: with whom the hero lives.
        hobby: what the hero likes to do; told in long stories.
        chosen: name -> word or phrase, of the shared words (``place``, ``weather``, ``sight``, ``treat``) and of the
            scene's own.
        ending: which of the endings.
    """

    scene: Scene
    hero: Character
    friend: Character
    size: str
    trait: str
    elder: str
    hobby: str
    chosen: dict[str, str]
    ending: int


_SPREAD = 2**89 - 1
"""A prime larger than any scene: times it, modulo a scene's size, is one to one and leaves no choice out."""
SHARED = {"place": "places", "weather": "weather", "sight": "sights", "treat": "treats"}
"""Words that a plot of any scene has, and the lists that they are of."""
NOUNS = ("place", "sight", "treat")
"""Those of them that a prompt may ask for."""


@cache
def _radices(scene: Scene, choices: int | None) -> tuple[int, ...]:
    words = content(choices).words
    people = (2, len(words["he"]), len(words["kinds"]), len(words["he"]), len(words["kinds"]) - 1)
    own = [len(values) for values in (*scene.words.values(), *scene.phrases.values())]
    shared = [len(words[name]) for name in ("sizes", "traits", "elders", *SHARED.values())]
    return (*people, *own, *shared, len(content(choices).hobbies), len(content().endings))


@cache
def _size(scene: Scene, choices: int | None) -> int:
    return math.prod(_radices(scene, choices))


@cache
def plot_count(choices: int | None = None) -> int:
    """Plots with a number: as many of each scene as the scene with the fewest has; ``choices``: see ``content``."""
    scenes = content(choices).scenes
    return len(scenes) * min(_size(scene, choices) for scene in scenes)


def plot(number: int, choices: int | None = None) -> Plot:
    """The plot of a number from 0 to :func:`plot_count` - 1; in a world of other ``choices`` another plot has it."""
    scenes, words = content(choices).scenes, content(choices).words
    rest, which = divmod(number, len(scenes))
    scene = scenes[which]
    rest = rest * _SPREAD % _size(scene, choices)
    digits = []
    for radix in _radices(scene, choices):
        rest, digit = divmod(rest, radix)
        digits.append(digit)
    left = iter(digits)
    female, name, kind, other_name, other_kind = (next(left) for _ in range(5))
    hero_names, friend_names = (words["she"], words["he"]) if female else (words["he"], words["she"])
    chosen = {name: values[next(left)] for name, values in (*scene.words.items(), *scene.phrases.items())}
    size, trait, elder = (words[name][next(left)] for name in ("sizes", "traits", "elders"))
    chosen |= {name: words[listed][next(left)] for name, listed in SHARED.items()}
    other_kind += other_kind >= kind
    return Plot(
        scene,
        character(hero_names[name], words["kinds"][kind], bool(female)),
        character(friend_names[other_name], words["kinds"][other_kind], not female),
        size,
        trait,
        elder,
        content(choices).hobbies[next(left)],
        chosen,
        next(left),
    )


def character(name: str, kind: str, female: bool) -> Character:
    """Someone of a kind of ``content``; a child is a boy or a girl."""
    return Character(name, ("girl" if female else "boy") if kind == CHILD else kind, female)


def number_of(seed: int, index: int, choices: int | None = None) -> int:
    """The number of the plot at ``index`` in the order that ``seed`` gives all plots: a bijection, by cycle walking.

    Steps that can be undone (odd factors, added keys, and shifted bits, modulo a power of two) go on until they lead
    to a number that is a plot's.

    Raises:
        DataError: there is no such index.
    """
    count = plot_count(choices)
    if not 0 <= index < count:
        raise DataError(f"there is no story {index}", source="rows", remedy=f"stay below {count:,}")
    bits, keys = count.bit_length(), _keys(seed)
    mask, half = (1 << bits) - 1, bits // 2
    number = index
    while True:
        for factor, added in keys:
            number = (number * factor + added) & mask
            number ^= number >> half
        if number < count:
            return number


@cache
def _keys(seed: int) -> tuple[tuple[int, int], ...]:
    def draws() -> Iterator[int]:
        for place in range(6):
            yield int.from_bytes(hashlib.blake2b(f"stories {seed} {place}".encode(), digest_size=32).digest(), "big")

    drawn = list(draws())
    return tuple((factor | 1, added) for factor, added in zip(drawn[::2], drawn[1::2], strict=True))


class Shares(NamedTuple):
    """Of rows, those that are held out."""

    valid: float = 0.02
    test: float = 0.02

    def split_of(self, what: str) -> str:
        """The split of what must not be in two of them, by its hash alone: the lowest part valid, the highest test."""
        position = hash_of(f"stories {what}") / 2**64
        if position >= 1 - self.test:
            return "test"
        return "valid" if position < self.valid else "train"

    def check(self) -> None:
        """Refuse shares that leave nothing to train on.

        Raises:
            DataError: one is negative, or both are 1 or more together.
        """
        if not (self.valid >= 0 and self.test >= 0 and self.valid + self.test < 1):
            raise DataError(
                f"valid {self.valid} and test {self.test} are no shares that leave rows for train",
                source="--valid-fraction, --test-fraction",
                remedy="give two numbers from 0, below 1 together",
            )

    def as_key(self) -> dict[str, float]:
        """For what decides a step."""
        return {"valid_fraction": self.valid, "test_fraction": self.test}


DEFAULT_SHARES = Shares()
