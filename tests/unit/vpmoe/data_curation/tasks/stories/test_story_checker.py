"""The checker on hand-written stories and on hostile text."""

from __future__ import annotations

import random
import re
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe.data_curation.tasks.stories.checker import Constraints, check_story
from vpmoe.data_curation.tasks.stories.plots import plot
from vpmoe.data_curation.tasks.stories.telling import tell
from vpmoe.errors import DataError

ASKED = Constraints("Pip", "fox", "courage", ("kite", "river"), ("sad",))
STORY = "Once there was a small fox named Pip. Pip lost his kite in the river. A bear named Tim found it."


@pytest.mark.parametrize(
    ("text", "right"),
    [
        (STORY, True),
        ("A FOX met Pip.", True),
        ("Pip's tail was long, for he was a fox.", True),
        ("Pip was a fox. His mother called Pip home.", True),
        ("Pip was brave.", False),  # of which kind?
        ("There was a small bear named Pip, and a fox.", False),
        *(
            (f"{opening} Then a fox came.", False)  # the fox is another
            for opening in (
                "A small bear called Pip sat.",
                "A bear, named Pip, sat.",
                "A bear whose name was Pip sat.",
                "There was a bear. His name was Pip.",
                "Pip was a very small bear.",
                "There lived Pip, a small bear, with his aunt.",
            )
        ),
        ("The bear called Pip. Pip was a fox.", True),
        ("Next to Pip, a bear sat down. Pip was a fox.", True),
        ("Pip was a bear's friend and a fox.", True),
        ("There was a small fox named Tim.", False),
        ("Tim was a bear who met a fox named Pip. Pip ran.", False),  # Tim comes first
        ("Pip was a fox. Tim ran. Tim fell. Tim cried.", False),  # Tim takes over
        ("Pip was a fox who met a bear called Zorro. Zorro ran. Zorro fell.", False),  # a name that we do not have
        ("There was a fox. pip, it said.", False),
        ("The fox had a Pippin.", False),
        ("", False),
    ],
)
def test_who_leads(text: str, right: bool) -> None:
    assert check_story(text, ASKED).protagonist_right is right


@pytest.mark.parametrize(
    ("word", "text", "there"),
    [
        *(
            (("kite"), form, True)
            for form in ("kite", "KITE!", "kites", "kite's", "kite’s", "“kite”", "kited", "kiting")
        ),
        *(("kite", other, False) for other in ("kit", "kitebird", "box-kite", "akite", "k i t e")),
        *(("stop", form, True) for form in ("stops", "stopped", "stopping")),
        *(("visit", form, True) for form in ("visits", "visited", "visiting")),
        *(("agree", form, True) for form in ("agrees", "agreed", "agreeing")),
        *(
            (word, form, False)
            for word, form in (("bee", "being"), ("hop", "hoped"), ("car", "card"), ("car", "cares"))
        ),
        *((word, form, False) for word, form in (("hat", "hated"), ("star", "stared"), ("stop", "stoped"))),
        ("berry", "berries", True),
        ("carry", "carried", True),
        ("box", "boxes", True),
        ("play", "plaies", False),
        ("play", "played", True),
        *(("quit", form, True) for form in ("quits", "quitting")),
        ("mouse", "mice", False),
        ("Über", "über", True),
    ],
)
def test_words_and_their_forms(word: str, text: str, there: bool) -> None:
    asked = Constraints("Pip", "fox", "courage", (word,), (word,))
    check = check_story(f"He saw {text}, and left.", asked)
    assert check.required_present is there and check.missing == (() if there else (word,))
    assert check.banned_present == ((word,) if there else ())


def test_the_whole_of_it() -> None:
    assert check_story(STORY, ASKED).passed
    failed = check_story(STORY.replace("kite", "hat") + " He was sad.", ASKED.as_row())
    assert (failed.missing, failed.banned_present, failed.protagonist_right) == (("kite",), ("sad",), True)
    assert not failed.passed and Constraints.of_row(ASKED.as_row()) == ASKED


@given(st.integers(0, 2**62), st.booleans())
def test_a_story_of_the_grammar_is_of_its_heros_kind_and_of_no_other(index: int, long: bool) -> None:
    told = plot(index)
    text, hero, friend = tell(told, random.Random(index), long=long), told.hero, told.friend
    asked = Constraints(hero.name, hero.kind, told.scene.theme, (), ())
    right, other = (check_story(text, one).protagonist_right for one in (asked, replace(asked, kind=friend.kind)))
    often = [len(re.findall(rf"\b{one.name}\b", text)) for one in (hero, friend)]
    assert right is (often[0] >= often[1]) and not other
    assert not check_story(text, replace(asked, name=friend.name, kind=friend.kind)).protagonist_right


@given(st.text(max_size=150) | st.text("Pipfox named'\n\0\"", max_size=150), st.text(max_size=20))
def test_hostile_text_is_checked_like_any(text: str, word: str) -> None:
    check_story(text, ASKED)
    assert check_story(f"{STORY} {text}", ASKED).required_present
    row = {**ASKED.as_row(), "banned_words": [word]}
    try:
        check_story(text + word, row)
    except DataError as error:
        assert repr(word) in error.what


@pytest.mark.parametrize(
    "change",
    [
        {"protagonist": "Pip"},
        {"protagonist": {"name": "Pip"}},
        {"protagonist": {"name": "Mary Ann", "kind": "fox"}},
        {"required_words": None},
        {"required_words": "kite"},
        {"required_words": ["ice cream"]},
        {"banned_words": [3]},
        {"theme": None},
    ],
)
def test_constraints_that_are_none_are_refused(change: dict) -> None:
    with pytest.raises(DataError, match="no constraints"):
        check_story(STORY, {**ASKED.as_row(), **change})
