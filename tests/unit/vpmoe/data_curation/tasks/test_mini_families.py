"""Every family, level and language: answers found again from the text, true derivations, no question in two splits."""

import json
import random
import re
from pathlib import Path

import pytest
from conftest_mini import solve
from conftest_mini_steps import assert_derived
from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe.data_curation.datasets.plan import split_of
from vpmoe.data_curation.tasks.family import BUCKETS, LANGUAGES
from vpmoe.data_curation.tasks.registry import FAMILIES
from vpmoe.data_curation.tasks.synth_mini import check, make_row, parse_levels
from vpmoe.data_curation.tasks.synth_mini import test_rows as held_out_rows
from vpmoe.errors import DataError

EVEN = dict.fromkeys(FAMILIES, 1.0)
LEVELS = [(name, level) for name, family in FAMILIES.items() for level in family.levels]
DATASHEET = Path(__file__).parents[5] / "docs" / "synth_mini.md"


@settings(max_examples=300)
@given(
    seed=st.integers(0, 50),
    index=st.integers(0, 10**8 - 1),
    family=st.sampled_from(sorted(FAMILIES)),
    languages=st.lists(st.sampled_from(LANGUAGES), min_size=1, unique=True),
)
def test_answers_follow_from_the_text_and_every_step_is_true(
    seed: int, index: int, family: str, languages: list[str]
) -> None:
    row = make_row(seed, index, {family: 1.0}, {}, languages)
    assert row == make_row(seed, index, {family: 1.0}, {}, languages), "a row is a function of seed and index"
    assert row["language"] in languages and row["constraints"] in FAMILIES[family].levels
    _, answer = solve(row)
    assert row["synthetic_answer"] == answer
    assert check(f" {answer}\n", row) and not check(answer + "0", row) and not check("", row)
    assert_derived(row)


@pytest.mark.parametrize(("family", "level"), LEVELS)
def test_a_level_fills_every_bucket_and_keeps_to_itself(family: str, level: str) -> None:
    rows = [make_row(2, index, {family: 1.0}, {family: (level,)}, LANGUAGES) for index in range(150)]
    assert {row["constraints"] for row in rows} == {level}
    assert {row["language"] for row in rows} == set(LANGUAGES)
    filled = {FAMILIES[family].ask(bucket, (level,), random.Random(bucket)) for bucket in range(BUCKETS)}
    assert len(filled) == BUCKETS


@pytest.mark.slow
@settings(max_examples=4)
@given(seeds=st.lists(st.integers(0, 1000), min_size=2, max_size=2, unique=True), buckets=st.integers(1, 6))
def test_no_question_is_in_two_splits_whatever_its_language(seeds: list[int], buckets: int) -> None:
    """Several seeds together: questions and, in any language, their texts belong to one split."""
    asked = {"train": set(), "valid": set(), "test": set()}
    texts = {"train": set(), "valid": set(), "test": set()}
    for seed in seeds:
        for index in range(800):
            row = make_row(seed, index, EVEN, {}, LANGUAGES)
            split = split_of(row["synth_id"], buckets / BUCKETS)
            asked[split].add(solve(row)[0])
            texts[split].add(row["query"])
    for row in held_out_rows(EVEN, seeds[0], {}, LANGUAGES):
        asked["test"].add(solve(row)[0])
        texts["test"].add(row["query"])
    for one, other in (("train", "valid"), ("train", "test"), ("valid", "test")):
        assert not asked[one] & asked[other]
        assert not texts[one] & texts[other]


def test_no_question_is_in_two_splits_where_questions_are_few() -> None:
    """So many rows of the smallest levels that most questions come again: each time in the same split."""
    levels = {"units": ("one unit",), "puzzles": ("order of 3",), "dates": ("weekday",), "sorting": ("3 digits",)}
    asked: dict[str, list[tuple]] = {"train": [], "valid": []}
    for index in range(6000):
        row = make_row(index % 3, index, dict.fromkeys(levels, 1.0), levels, LANGUAGES)
        asked[split_of(row["synth_id"], 0.25)].append(solve(row)[0])
    held_out = {solve(row)[0] for row in held_out_rows(dict.fromkeys(levels, 1.0), 1, levels, LANGUAGES)}
    train, valid = set(asked["train"]), set(asked["valid"])
    assert len(train) < 0.8 * len(asked["train"]), "questions come again"
    assert not train & valid and not (train | valid) & held_out


def test_a_question_is_on_one_side_in_all_languages_and_wordings() -> None:
    for family in FAMILIES.values():
        instance = family.ask(3, family.levels, random.Random(1))
        asked = set()
        for language in LANGUAGES:
            for seed in range(8):
                worked = family.work(instance, random.Random(seed), language)
                row = {"exercise": family.name, "language": language, "query": worked.query}
                asked.add(solve(row)[0])
        assert len(asked) == 1, family.name


def test_held_out_questions_are_those_of_the_levels_in_every_language() -> None:
    levels = {"units": ("back",), "puzzles": ("liars", "order of 3"), "sorting": ("3 digits",)}
    rows = list(held_out_rows(dict.fromkeys(levels, 1.0), 1, levels, ("en", "fr")))
    assert {(row["exercise"], row["constraints"]) for row in rows} == {
        (name, level) for name, chosen in levels.items() for level in chosen
    }
    assert len({row["synth_id"] for row in rows}) == len(rows)
    by_language = {code: {solve(row)[0] for row in rows if row["language"] == code} for code in ("en", "fr")}
    assert by_language["en"] == by_language["fr"]
    assert sum(row["exercise"] == "puzzles" for row in rows) == 2 * 2 * 150
    for row in rows:
        assert solve(row)[1] == row["synthetic_answer"]
        assert_derived(row)


def test_levels_are_spelled_with_bars() -> None:
    assert parse_levels("") == {}
    assert parse_levels("units=back,dates=weekday|days later") == {
        "units": ("back",),
        "dates": ("weekday", "days later"),
    }
    with pytest.raises(DataError, match="--levels"):
        parse_levels("units")


def test_the_datasheet_names_every_level_and_its_examples_are_right() -> None:
    text = DATASHEET.read_text()
    for name, level in LEVELS:
        assert f"`{name}`" in text and level in text
    (block,) = re.findall(r"```jsonl\n(.*?)```", text, re.DOTALL)
    rows = [json.loads(line) for line in block.splitlines()]
    assert {(row["exercise"], row["language"]) for row in rows} == {
        (name, code) for name in FAMILIES for code in LANGUAGES
    }
    for row in rows:
        assert solve(row)[1] == row["synthetic_answer"]
        assert_derived(row)
