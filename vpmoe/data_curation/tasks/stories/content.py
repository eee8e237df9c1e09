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
from collections.abc import Mapping
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
        frame: what stands before a scene (``openings``, ``traits``, ``habits``, ``sights``), each with its wordings.
        endings: ways for a story to end, each with its wordings.
        morals: theme -> wordings.
        scenes: in a fixed order, as many of each theme.
    """

    words: Mapping[str, tuple[str, ...]]
    hobbies: tuple[str, ...]
    asking: Mapping[str, Forms]
    frame: Mapping[str, Forms]
    endings: tuple[Forms, ...]
    morals: Mapping[str, Forms]
    scenes: tuple[Scene, ...]


@cache
def content() -> Content:
    """What ``stories.toml`` holds."""
    read = tomllib.loads(FILE.read_text(encoding="utf-8"))
    return Content(
        {name: tuple(listed.split()) for name, listed in read["words"].items()},
        tuple(read["hobbies"]),
        {name: _forms(listed) for name, listed in read["asking"].items()},
        {name: _forms(listed) for name, listed in read["frame"].items()},
        tuple(_forms(listed) for listed in read["endings"]),
        {theme: _forms(listed) for theme, listed in read["morals"].items()},
        tuple(_scene(entry) for entry in read["scenes"]),
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


def _scene(entry: Mapping[str, Any]) -> Scene:
    beats = tuple(Beat(_forms(beat.get("told") or beat["extra"]), "extra" in beat) for beat in entry["beats"])
    words = {name: tuple(listed.split()) for name, listed in entry["words"].items()}
    return Scene(entry["theme"], words, {name: tuple(listed) for name, listed in entry["phrases"].items()}, beats)


def _forms(listed: list[str]) -> Forms:
    return tuple(map(_spellings, listed))


def _spellings(form: str) -> tuple[str, ...]:
    """A form with each choice of its ``[this|that]``."""
    pieces = _EITHER.split(form)
    choices = [piece.split("|") if place % 2 else [piece] for place, piece in enumerate(pieces)]
    return tuple(map("".join, product(*choices)))
