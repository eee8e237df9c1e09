"""What stories are made of, as ``stories.toml`` lists it: words, sentences of the frame, and scenes with their beats.

A sentence is written with names in braces, and with ``[this|that]`` where either will do. In braces stand a word of the
plot (``{game}``), the same with its article (``{a_game}``) or as a sentence begins with it (``{A_fkind}``), and:

========================  =============================================================================
hero he him his himself   the protagonist (``He``, ``His``)
friend she her hers       the other one, of the other gender, so that each pronoun is clear; ``hers`` is the possessive
                          form before a noun (``She``)
kind, fkind               what hero and friend are
elder                     with whom the hero lives, as ``his mother`` (``Elder``)
when                      ``one windy morning``
========================  =============================================================================
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("stories.toml")
CHILD = "child"
"""A kind that is called by its gender."""

Forms = tuple[tuple[str, ...], ...]
"""Ways to word one sentence or a few; each in all its spellings."""

_EITHER = re.compile(r"\[([^][]*)\]")


@dataclass(frozen=True, slots=True)
class Beat:
    """One step of a scene.

    Attributes:
        forms: its wordings.
        extra: told in long stories alone.
    """

    forms: Forms
    extra: bool


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What happens: a goal, what stands in its way, who helps, how it ends; in the order of its beats.

    Attributes:
        theme: what it is about.
        words: name -> single words of which a plot has one; each stands in every telling.
        phrases: name -> longer parts of which a plot has one.
        beats: at least one of them is extra.
    """

    theme: str
    words: Mapping[str, tuple[str, ...]]
    phrases: Mapping[str, tuple[str, ...]]
    beats: tuple[Beat, ...]


@dataclass(frozen=True, slots=True)
class Content:
    """All of it.

    Attributes:
        words: names (``he``, ``she``), ``kinds``, the other words that all scenes share, and words that a prompt may
            ban: wordings have them that could as well be others.
        hobbies: what a hero likes to do.
        asking: parts of a prompt (``who``, ``requests``, ``themes``, ``required``, ``banned``), each with its wordings.
        readers: sentences of first readers (see :func:`telling.read_first`), each with its wordings.
        frame: what stands before a scene (``openings``, ``traits``, ``habits``, ``sights``), each with its wordings.
        endings: ways for a story to end, each with its wordings.
        morals: theme -> wordings.
        scenes: in a fixed order, as many of each theme.
    """

    words: Mapping[str, tuple[str, ...]]
    hobbies: tuple[str, ...]
    asking: Mapping[str, Forms]
    readers: Mapping[str, Forms]
    frame: Mapping[str, Forms]
    endings: tuple[Forms, ...]
    morals: Mapping[str, Forms]
    scenes: tuple[Scene, ...]


@cache
def content(choices: int | None = None) -> Content:
    """What ``stories.toml`` holds; with ``choices`` a smaller world, of at most so many of each list of things to tell.

    Wordings stay as many as they are, and so do the words that a prompt may ban.
    """
    read = tomllib.loads(FILE.read_text(encoding="utf-8"))
    words = {name: tuple(listed.split()) for name, listed in read["words"].items()}
    return Content(
        {name: listed if name == "banned" else _some(listed, choices) for name, listed in words.items()},
        _some(read["hobbies"], choices),
        {name: _forms(listed) for name, listed in read["asking"].items()},
        {name: _forms(listed) for name, listed in read["readers"].items()},
        {name: _forms(listed) for name, listed in read["frame"].items()},
        tuple(_forms(listed) for listed in read["endings"]),
        {theme: _forms(listed) for theme, listed in read["morals"].items()},
        tuple(_scene(entry, choices) for entry in read["scenes"]),
    )


@cache
def names() -> frozenset[str]:
    """Those that characters have."""
    return frozenset((*content().words["he"], *content().words["she"]))


@cache
def kinds() -> frozenset[str]:
    """What characters are called."""
    return frozenset((*content().words["kinds"], "boy", "girl")) - {CHILD}


@cache
def with_article(phrase: str) -> str:
    """``a`` or ``an`` before a phrase; each word of the stories that begins with a vowel's letter also sounds so."""
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def _some(listed: Sequence[str], choices: int | None) -> tuple[str, ...]:
    """At most so many of them, from all over the list."""
    count = len(listed) if choices is None else min(choices, len(listed))
    return tuple(listed[place * len(listed) // count] for place in range(count))


def _scene(entry: Mapping[str, Any], choices: int | None) -> Scene:
    beats = tuple(Beat(_forms(beat.get("told") or beat["extra"]), "extra" in beat) for beat in entry["beats"])
    words = {name: _some(listed.split(), choices) for name, listed in entry["words"].items()}
    phrases = {name: _some(listed, choices) for name, listed in entry["phrases"].items()}
    return Scene(entry["theme"], words, phrases, beats)


def _forms(listed: list[str]) -> Forms:
    return tuple(map(_spellings, listed))


def _spellings(form: str) -> tuple[str, ...]:
    """A form with each choice of its ``[this|that]``."""
    pieces = _EITHER.split(form)
    choices = [piece.split("|") if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return tuple(map("".join, product(*choices)))
