"""Instructions and pairs of stories: what is asked is kept, by an independent reading; splits share no combination."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from vpmoe.cli import main
from vpmoe.data_curation.conversations.chat_rows import chat_messages, preference_pair, without_keys
from vpmoe.data_curation.tasks.stories.checker import StoryCheck, check_story
from vpmoe.data_curation.tasks.stories.content import content
from vpmoe.data_curation.tasks.stories.plots import Shares, plot_count
from vpmoe.data_curation.tasks.stories.prompts import make_pair, make_prompt

INDICES = st.integers(0, plot_count() - 1)
SEEDS = st.integers(0, 5)


@given(index=INDICES, seed=SEEDS)
@example(195180954971153317971, 4)  # a lizard is seen and another one found
def test_a_completion_keeps_to_what_its_prompt_asks(index: int, seed: int) -> None:
    row = make_prompt(seed, index)
    assert row == make_prompt(seed, index)
    asked, story, prompt = row["constraints"], row["completion"], row["prompt"]
    assert check_story(story, asked) == StoryCheck(True, (), True, ())
    # Read without the checker, and told in the prompt.
    for word in asked["required_words"]:
        assert re.search(rf"\b{word}\b", story) and re.search(rf"\b{word}\b", prompt)
    for word in asked["banned_words"]:
        assert not re.search(rf"\b{word}\b", story, re.I) and re.search(rf"\b{word}\b", prompt)
    hero = asked["protagonist"]
    assert all(re.search(rf"\b{said}\b", prompt) for said in (hero["name"], hero["kind"], asked["theme"]))
    assert not set(asked["required_words"]) & set(asked["banned_words"])
    assert (
        2 <= len(set(asked["required_words"])) == len(asked["required_words"]) <= 3
        and 1 <= len(asked["banned_words"]) <= 2
    )
    assert 60 <= len(story.split()) <= 120 and len(prompt.split()) < 60
    assert not re.search(r"[{}\[\]|]|  |\ba [aeiou]|\ban (?!hour)[^aeiou]", prompt + story)


@given(index=INDICES, seed=SEEDS)
@example(296656998641413636779, 8)  # its story is one of the stories that they tell each other
def test_a_story_without_a_required_word_or_with_a_banned_one_fails(index: int, seed: int) -> None:
    row = make_prompt(seed, index)
    asked, story = row["constraints"], row["completion"]
    word, banned = asked["required_words"][0], asked["banned_words"][0]
    every_form = rf"\b{word[:-1]}({word[-1]}(s|es|d|ed)?|ies|ied|ing)\b"
    check = check_story(re.sub(every_form, "thing", story), asked)
    assert check.missing == (word,) and not check.required_present and check.protagonist_right
    assert check_story(f"{story} {banned.title()}!", asked).banned_present == (banned,)


@given(index=INDICES, seed=SEEDS)
def test_a_rejected_story_fails_on_the_protagonist_alone(index: int, seed: int) -> None:
    row = make_pair(seed, index)
    assert check_story(row["chosen"], row["constraints"]).passed
    assert check_story(row["rejected"], row["constraints"]) == StoryCheck(True, (), False, ())
    hero = row["constraints"]["protagonist"]
    assert not re.search(rf"\b{hero['kind']}\b", row["rejected"])
    assert len(row["chosen"].split()) == len(row["rejected"].split())


def test_a_quarter_of_the_rejected_stories_have_another_name_too() -> None:
    rows = [make_pair(1, index) for index in range(300)]
    kept = sum(row["constraints"]["protagonist"]["name"] in row["rejected"] for row in rows)
    assert 200 < kept < 250


def test_slips_are_of_the_favourite_kind_and_in_training_rows_alone() -> None:
    rows = [(make_prompt(1, index), make_prompt(1, index, slips=0.4)) for index in range(500)]
    slipped = [slip for right, slip in rows if slip != right]
    train = sum(right["split"] == "train" for right, _ in rows)
    assert 0.3 * train < len(slipped) < 0.45 * train and {row["split"] for row in slipped} == {"train"}
    for row in slipped:
        assert check_story(row["completion"], row["constraints"]) == StoryCheck(True, (), False, ())
        assert row["constraints"]["protagonist"]["name"] in row["completion"]
        assert re.search(rf"\b{content().words['kinds'][0]}\b", row["completion"])
    # Of 8 kinds a quarter of the rows have the favourite as hero or friend, and cannot slip.
    small = [(make_prompt(1, at, choices=8), make_prompt(1, at, choices=8, slips=0.4)) for at in range(500)]
    assert 0.25 < sum(slip != right for right, slip in small if right["split"] == "train") / 500 < 0.34
    words = ["data", "story-prompts", "--output-dir", "unused", "--slips", "0.1", "--pairs"]
    assert main(words) == 2


def test_no_combination_is_in_two_splits() -> None:
    parts: dict[str, set[tuple]] = {"train": set(), "valid": set(), "test": set()}
    prompts: dict[str, set[str]] = {split: set() for split in parts}
    for seed in (1, 2):
        for make in (make_prompt, make_pair):
            for index in range(250):
                row = make(seed, index, Shares(0.2, 0.2))
                asked = row["constraints"]
                hero = asked["protagonist"]
                combination = (hero["name"], hero["kind"], asked["theme"], *sorted(asked["required_words"]))
                parts[row["split"]].add(combination)
                prompts[row["split"]].add(row["prompt"])
    for one in parts:
        assert len(parts[one]) > 60
        for other in parts.keys() - {one}:
            assert not parts[one] & parts[other] and not prompts[one] & prompts[other]
    # What is unseen is the combination: every single part of it is in train as well.
    seen = {part for combination in parts["train"] for part in combination}
    told = [part for combination in parts["test"] for part in combination]
    assert sum(part in seen for part in told) > 0.9 * len(told)


@pytest.mark.parametrize(("flags", "reader"), [([], chat_messages), (["--pairs"], preference_pair)])
def test_the_builders_read_the_rows(tmp_path: Path, flags: list[str], reader) -> None:
    command = ["data", "story-prompts", "--output-dir", str(tmp_path), "--rows", "40", "--quiet", *flags]
    assert main(command) == 0
    rows = [json.loads(line) for file in sorted(tmp_path.glob("*.jsonl")) for line in file.open()]
    assert len(rows) == 40
    for row in rows:
        assert reader(without_keys(row, ("constraints",)))
