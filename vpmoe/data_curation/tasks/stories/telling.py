"""A plot in words: each beat in one of its wordings, long or short."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import TypeVar

from vpmoe.data_curation.tasks.stories.content import Forms, content, with_article
from vpmoe.data_curation.tasks.stories.plots import NOUNS, Plot

_PARTS_OF_DAY = ("morning", "afternoon", "day")
_PARAGRAPH = "\n\n"
Choice = TypeVar("Choice")


def tell(plot: Plot, draw: random.Random, *, long: bool) -> str:
    """The story of a plot: paragraphs with a blank line between them.

    Args:
        plot: what is told.
        draw: chooses the wording; the same draws give the same form of another plot of the scene.
        long: all of the plot, 130 to 200 words; else without trait, hobby, the extra beats and the moral, 60 to 120.
    """
    frame, scene = content().frame, plot.scene
    slots = _slots(plot, draw)

    def told(forms: Forms) -> str:
        return _sentence(forms, slots, draw)

    parts = ("openings", "traits", "habits", "sights") if long else ("openings", "sights")
    beginning = [told(frame[part]) for part in parts]
    beats = [told(beat.forms) for beat in scene.beats if long or not beat.extra]
    end = [told(content().endings[plot.ending])]
    if long:
        end.append(told(content().morals[scene.theme]))
    paragraphs = [beginning, beats, end]
    if long:
        middle = len(beats) // 2 + int(draw.random() * 2)
        paragraphs[1:2] = [beats[:middle], beats[middle:]]
    elif draw.random() < 0.5:
        paragraphs = [beginning + beats, end]
    return _PARAGRAPH.join(map(" ".join, paragraphs))


def read_first(plot: Plot, draw: random.Random) -> str:
    """A first reader: a line names the hero of a plot and two or three of its words, short sentences use each twice.

    Half of such a text has been said before in it, where in a story a name comes every twenty words: a small model
    learns from it to take a word from what it has read.
    """
    forms, needed = content().readers, [*some_words(draw)]
    slots = _slots(plot, draw) | {"words": listed([plot.chosen[name] for name in needed], draw)}
    slots["who"] = worded(content().asking["who"], slots, draw)
    told = [_sentence(forms[part], slots, draw) for part in ("titles", "heroes")]
    draw.shuffle(needed)
    parts = [part for name in needed for part in (name, f"{name}_again")]
    return " ".join(told + [_sentence(forms[part], slots, draw) for part in (*parts, "ends")])


def some_words(draw: random.Random) -> tuple[str, ...]:
    """Names of two or three of the nouns that every plot has, in any order."""
    names = [*NOUNS]
    draw.shuffle(names)
    return tuple(names[: pick((2, 3), draw)])


def listed(words: Sequence[str], draw: random.Random) -> str:
    """Words as a sentence lists them."""
    *first, last = words
    return f"{', '.join(first)}{pick((' and ', ', '), draw)}{last}" if first else last


def worded(forms: Forms, slots: Mapping[str, str], draw: random.Random) -> str:
    """One of the forms, one of its spellings, with what stands for the names in braces."""
    return pick(pick(forms, draw), draw).format_map(slots)


def _sentence(forms: Forms, slots: Mapping[str, str], draw: random.Random) -> str:
    """The same, and it begins with a capital."""
    text = worded(forms, slots, draw)
    return text[0].upper() + text[1:]


def pick(choices: Sequence[Choice], draw: random.Random) -> Choice:
    """One of them, as :meth:`random.Random.choice` and in a third of its time."""
    return choices[int(draw.random() * len(choices))]


def _slots(plot: Plot, draw: random.Random) -> dict[str, str]:
    """What stands for each name in braces; see ``content``."""
    hero, friend, chosen = plot.hero, plot.friend, plot.chosen
    he, him, his, self = ("she", "her", "her", "herself") if hero.female else ("he", "him", "his", "himself")
    she, her, hers = ("she", "her", "her") if friend.female else ("he", "him", "his")
    day = f"{chosen['weather']} {pick(_PARTS_OF_DAY, draw)}"
    when = f"one {day}" if draw.random() < 0.5 else f"on {with_article(day)}"
    slots = {
        **{"hero": hero.name, "he": he, "He": he.capitalize(), "him": him, "himself": self},
        **{"his": his, "His": his.capitalize(), "a_size": with_article(plot.size)},
        **{"kind": hero.kind, "a_kind": with_article(hero.kind)},
        **{"friend": friend.name, "she": she, "She": she.capitalize(), "her": her, "hers": hers},
        **{"fkind": friend.kind, "a_fkind": with_article(friend.kind)},
        **{"elder": f"{his} {plot.elder}", "Elder": f"{his.capitalize()} {plot.elder}"},
        **{"when": when, "When": when.capitalize(), "trait": plot.trait, "hobby": plot.hobby},
        "the_place": f"the {chosen['place']}",
    }
    slots["A_fkind"] = slots["a_fkind"].capitalize()
    for name, value in chosen.items():
        if "{" in value:
            value = value.format_map(slots)
        slots[name] = value
        slots[f"a_{name}"] = with_article(value)
    return slots
