"""Stories that were asked for, and the constraints that they keep to.

A prompt asks for a protagonist, a theme, two or three words that have to come and one or two that must not. What has to
come is of the plot (a place, a sight, a treat), so that its story has it; what must not are words that some
stories have and this one has not. Each row is held to :func:`checker.check_story` before it is written.

The split is decided by the hash of what is asked together (protagonist, theme, required words): no such combination is
in two splits, whatever the seed. A row is a pure function of seed and index.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, replace
from typing import Any

from vpmoe.data_curation.tasks.family import hash_of
from vpmoe.data_curation.tasks.stories.checker import Constraints, check_story, is_in, words_of
from vpmoe.data_curation.tasks.stories.content import content, with_article
from vpmoe.data_curation.tasks.stories.plots import DEFAULT_SHARES, Character, Plot, Shares, character, number_of, plot
from vpmoe.data_curation.tasks.stories.telling import listed, pick, some_words, tell, worded

SHORTEST, LONGEST = 60, 120
"""Words of a completion."""
_OTHER_NAME = 0.25
"""Share of the rejected stories whose protagonist has another name too."""


@dataclass(frozen=True, slots=True)
class Asked:
    """What a row asks for, and a story that keeps to it.

    Attributes:
        plot: of the story.
        constraints: what is asked.
        prompt: the same in words.
        story: keeps to the constraints.
        wording: seed of its wording, which another protagonist's story of the plot may take too.
        choices: of the world that the plot is of.
    """

    plot: Plot
    constraints: Constraints
    prompt: str
    story: str
    wording: int
    choices: int | None = None

    @property
    def combination(self) -> str:
        """What must not be in two splits."""
        asked = self.constraints
        return f"{asked.name} {asked.kind} {asked.theme} {' '.join(sorted(asked.required))}"


def ask(seed: int, index: int, choices: int | None = None) -> Asked:
    """What row ``index`` under ``seed`` asks for, in a world of so many ``choices`` (see ``content``).

    Raises:
        DataError: there are not so many plots.
    """
    number = number_of(seed, index, choices)
    chosen = plot(number, choices)
    for attempt in itertools.count():
        wording = hash_of(f"prompt {seed} {number} {attempt}")
        draw = random.Random(wording)
        needed = some_words(draw)
        story = tell(chosen, random.Random(wording), long=False)
        banned = _banned(story, draw)
        required = tuple(chosen.chosen[name] for name in needed)
        asked = Constraints(chosen.hero.name, chosen.hero.kind, chosen.scene.theme, required, banned)
        if banned and SHORTEST <= len(story.split()) <= LONGEST and check_story(story, asked).passed:
            return Asked(chosen, asked, _prompt(chosen, asked, draw), story, wording, choices)
    raise AssertionError("unreachable")


def row_of(asked: Asked, seed: int, index: int, stories: tuple[str, ...], shares: Shares) -> dict[str, Any]:
    """The row of what was asked and its stories: the completion, or the chosen and the rejected one."""
    pair = len(stories) == 2
    return {
        "id": f"story_{'pair' if pair else 'prompt'}_{seed}_{index:08d}",
        "split": shares.split_of(asked.combination),
        "prompt": asked.prompt,
        **dict(zip(("chosen", "rejected") if pair else ("completion",), stories, strict=True)),
        "constraints": asked.constraints.as_row(),
    }


def make_prompt(
    seed: int,
    index: int,
    shares: Shares = DEFAULT_SHARES,
    choices: int | None = None,
    slips: float = 0.0,
) -> dict[str, Any]:
    """Row ``index`` of instructions: ``id``, ``split``, ``prompt``, ``completion``, ``constraints``.

    Args:
        slips: of the training rows that can slip, the share whose completion is a careless writer's: right but for the
            protagonist, who is of the writer's favourite kind. Those whose hero or friend is of it anyway cannot (a
            quarter in a world of 8 choices, one in 18 in the whole one).
    """
    asked = ask(seed, index, choices)
    row = row_of(asked, seed, index, (asked.story,), shares)
    if row["split"] == "train" and hash_of(f"slip {asked.wording}") / 2**64 < slips:
        favourite = _favourite(choices)
        if favourite not in (asked.plot.hero.kind, asked.plot.friend.kind):
            row["completion"] = _told_of(replace(asked.plot.hero, kind=favourite), asked)
    return row


def make_pair(
    seed: int,
    index: int,
    shares: Shares = DEFAULT_SHARES,
    choices: int | None = None,
) -> dict[str, Any]:
    """Row ``index`` of pairs: ``id``, ``split``, ``prompt``, ``chosen``, ``rejected``, ``constraints``.

    ``rejected`` is the chosen story with another protagonist, word for word: all that is wrong with it.
    """
    asked = ask(seed, index, choices)
    told = _told_of(other_hero(asked), asked)
    return row_of(asked, seed, index, (asked.story, told), shares)


def other_hero(asked: Asked) -> Character:
    """A protagonist of the same gender, whom a rejected story is about: of another kind, a quarter by another name too.

    Where the name is right, the kind is the careless writer's favourite, if it can be.

    Where names tell two stories apart, the kind is hardly learned: it comes once or twice, the name in every sentence.
    """
    words, hero = content(asked.choices).words, asked.plot.hero
    taken = {hero.kind, asked.plot.friend.kind, *asked.constraints.required, *asked.constraints.banned}
    draw = random.Random(hash_of(f"rejected {asked.wording}"))
    others = [name for name in words["she" if hero.female else "he"] if name != hero.name]
    name = pick(others, draw) if draw.random() < _OTHER_NAME else hero.name
    found = [character(name, kind, hero.female) for kind in words["kinds"]]
    free = [other for other in found if other.kind not in taken]
    favourite = [other for other in free if other.kind == _favourite(asked.choices)]
    return favourite[0] if favourite and name == hero.name else pick(free, draw)


def _favourite(choices: int | None) -> str:
    """The kind that a careless writer has a hero of."""
    return content(choices).words["kinds"][0]


def _told_of(hero: Character, asked: Asked) -> str:
    """The story with another protagonist, word for word: that is all that is wrong with it."""
    told = tell(replace(asked.plot, hero=hero), random.Random(asked.wording), long=False)
    check = check_story(told, asked.constraints)
    assert check.required_present and not check.banned_present and not check.protagonist_right, told
    return told


def _banned(story: str, draw: random.Random) -> tuple[str, ...]:
    """One or two words of those that may be banned, which this story has not."""
    here = words_of(story)
    found = [word for word in content().words["banned"] if not is_in(word, here)]
    draw.shuffle(found)
    return tuple(found[: pick((1, 2), draw)])


def _prompt(chosen: Plot, asked: Constraints, draw: random.Random) -> str:
    """The constraints in words, the request first and the others in any order."""
    asking = content().asking
    slots = {"hero": asked.name, "kind": asked.kind, "a_size": with_article(chosen.size), "theme": asked.theme}
    slots["who"] = worded(asking["who"], slots, draw)
    parts = [
        worded(asking["themes"], slots, draw),
        worded(asking["required"], {"words": listed(asked.required, draw)}, draw),
        worded(asking["banned"], {"words": listed(asked.banned, draw)}, draw),
    ]
    draw.shuffle(parts)
    return " ".join([worded(asking["requests"], slots, draw), *parts])
