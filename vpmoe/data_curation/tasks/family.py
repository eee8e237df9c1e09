"""What a task family is, and how its questions are dealt to train, valid and test.

A question is its *instance*: what is asked, without wording, language, or an order that does not matter. Test questions
and the 20 buckets of the others are chosen by a hash of the instance, so every wording in every language of one
question is on the same side.
"""

from __future__ import annotations

import hashlib
import random
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

LANGUAGES = ("en", "de", "fr")
BUCKETS = 20
TEST_FRACTION = 0.1
HELD_OUT_PER_LEVEL = 150

Instance = tuple[Any, ...]
"""Integers, texts and tuples of them, in one canonical order: equal instances are the same question."""


@dataclass(frozen=True, slots=True)
class Worked:
    """One question worked out: the SYNTH fields that differ between rows."""

    query: str
    reasoning: str
    answer: str


Work = Callable[[Instance, random.Random, str], Worked]
"""``(instance, rng, language) -> Worked``; the rng chooses wording and order, never the answer."""


@dataclass(frozen=True, eq=False)
class Family(ABC):
    """A kind of task.

    Attributes:
        name: stored in the column ``exercise``.
        levels: its levels of difficulty, stored in the column ``constraints``.
        work: words an instance and works it out.
    """

    name: str
    levels: tuple[str, ...]
    work: Work

    @abstractmethod
    def ask(self, bucket: int, levels: tuple[str, ...], rng: random.Random) -> Instance:
        """An instance of the levels that is in ``bucket`` and not held out."""

    @abstractmethod
    def held_out(self, levels: tuple[str, ...]) -> list[Instance]:
        """Instances of the levels that are kept for the test, in a fixed order."""

    @abstractmethod
    def level_of(self, instance: Instance) -> str:
        """The level of an instance."""

    @abstractmethod
    def label(self, instance: Instance) -> str:
        """A name of the instance for use in ids."""

    def is_test(self, instance: Instance) -> bool:
        """Whether the instance is of the tenth that no row of the pool asks."""
        return hash_of(f"synth_mini test {self.name} {instance}") < TEST_FRACTION * 2**64

    def bucket(self, instance: Instance) -> int:
        """The bucket of an instance that is not held out."""
        return bucket_of(f"synth_mini {self.name} {instance}")


@dataclass(frozen=True, eq=False)
class ListedFamily(Family):
    """A family with few enough questions to list them: instances are tuples of integers.

    Attributes:
        instances: every question once, in a fixed order.
        level: of an instance.
    """

    instances: tuple[Instance, ...]
    level: Callable[[Instance], str]

    def ask(self, bucket: int, levels: tuple[str, ...], rng: random.Random) -> Instance:
        return rng.choice(_buckets(self, levels)[bucket])

    def held_out(self, levels: tuple[str, ...]) -> list[Instance]:
        return [each for each in self.instances if self.is_test(each) and self.level_of(each) in levels]

    def level_of(self, instance: Instance) -> str:
        return self.level(instance)

    def label(self, instance: Instance) -> str:
        return "_".join(map(str, instance))


@dataclass(frozen=True, eq=False)
class DrawnFamily(Family):
    """A family with too many questions to list them; an instance begins with its level.

    Every level needs thousands of questions, or drawing would not find one of each bucket.

    Attributes:
        draw: ``(level, rng) -> the rest of an instance``, in canonical order.
    """

    draw: Callable[[str, random.Random], Instance]

    def ask(self, bucket: int, levels: tuple[str, ...], rng: random.Random) -> Instance:
        level = rng.choice(levels)
        while True:  # 22 times on average
            instance = (level, *self.draw(level, rng))
            if self.bucket(instance) == bucket and not self.is_test(instance):
                return instance

    def held_out(self, levels: tuple[str, ...]) -> list[Instance]:
        return [instance for level in levels for instance in _drawn_tests(self, level)]

    def level_of(self, instance: Instance) -> str:
        return instance[0]

    def label(self, instance: Instance) -> str:
        return f"{hash_of(str(instance)):016x}"


def hash_of(text: str) -> int:
    """The first 8 bytes of blake2b as a big-endian number, the same rule by which the builder splits."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def bucket_of(text: str) -> int:
    """Which of the 20 equal parts of the hash's range ``text`` is in."""
    return hash_of(text) * BUCKETS >> 64


def spelled(number: int, width: int = 0) -> str:
    """The number's digits with blanks between them, with leading zeros up to ``width`` digits."""
    return " ".join(f"{number:0{width}d}")


def spaced(items: Sequence[object]) -> str:
    """The items with blanks between them."""
    return " ".join(map(str, items))


@cache
def _buckets(family: ListedFamily, levels: tuple[str, ...]) -> list[list[Instance]]:
    buckets: list[list[Instance]] = [[] for _ in range(BUCKETS)]
    for instance in family.instances:
        if family.level_of(instance) in levels and not family.is_test(instance):
            buckets[family.bucket(instance)].append(instance)
    return buckets


@cache
def _drawn_tests(family: DrawnFamily, level: str) -> tuple[Instance, ...]:
    rng = random.Random(f"synth_mini held out {family.name} {level}")
    found: dict[Instance, None] = {}
    while len(found) < HELD_OUT_PER_LEVEL:
        instance = (level, *family.draw(level, rng))
        if family.is_test(instance):
            found[instance] = None
    return tuple(found)
