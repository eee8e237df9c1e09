"""Stories: every index another plot, all of a plot told, English, and no plot in two splits."""

from __future__ import annotations

import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe.cli import main
from vpmoe.data_curation.tasks.stories import corpus
from vpmoe.data_curation.tasks.stories.checker import is_in, words_of
from vpmoe.data_curation.tasks.stories.content import FILE, content, kinds, names
from vpmoe.data_curation.tasks.stories.corpus import make_story
from vpmoe.data_curation.tasks.stories.plots import Plot, Shares, number_of, plot, plot_count
from vpmoe.data_curation.tasks.stories.telling import read_first, tell
from vpmoe.errors import DataError, NotOursError

INDICES = st.integers(0, plot_count() - 1)


def told_of(one: Plot) -> list[str]:
    """What a long story has to say of its plot; a phrase as far as it needs no pronoun."""
    people = [value for who in (one.hero, one.friend) for value in (who.name, who.kind)]
    return [*people, one.size, one.trait, one.elder, one.hobby, *(v.split("{")[0] for v in one.chosen.values())]


def test_there_are_millions_of_plots() -> None:
    assert plot_count() > 10**20
    assert plot_count() % len(content().scenes) == 0
    themes = Counter(scene.theme for scene in content().scenes)
    assert len(themes) == 13 and set(themes.values()) == {2} and themes.keys() == content().morals.keys()


@given(seed=st.integers(0, 5), indices=st.sets(INDICES, min_size=2, max_size=20))
def test_distinct_indices_are_distinct_plots(seed: int, indices: set[int]) -> None:
    numbers = {number_of(seed, index) for index in indices}
    assert len(numbers) == len(indices) and all(0 <= number < plot_count() for number in numbers)
    plots = [plot(number) for number in numbers]
    assert len({(*told_of(each), each.ending, each.scene.beats) for each in plots}) == len(plots)


@given(number=INDICES, seed=st.integers(0, 9))
def test_a_long_story_tells_all_of_its_plot(number: int, seed: int) -> None:
    one = plot(number)
    text = tell(one, random.Random(seed), long=True)
    for told in told_of(one):
        assert told.strip().lower() in text.lower(), told
    assert one.hero.female != one.friend.female and one.hero.kind != one.friend.kind
    words = [*one.scene.words, "place", "weather", "treat", "sight"]
    short = tell(one, random.Random(seed), long=False)
    assert all(re.search(rf"\b{one.chosen[word]}\b", short) for word in words)


@given(index=INDICES, seed=st.integers(0, 5))
def test_stories_are_english(index: int, seed: int) -> None:
    text = make_story(seed, index)["text"]
    assert text == make_story(seed, index)["text"]
    assert 120 <= len(text.split()) <= 200
    assert not re.search(r"[{}\[\]|]|  |\ba [aeiou]|\ban (?!hour)[^aeiou]| [,.!?]", text)
    assert re.fullmatch(r"[A-Za-z ,.!?'\":\n]+", text) and text.count('"') % 2 == 0
    for sentence in re.split(r"(?<=[.!?])\s+|\n+", text):
        # Behind a quotation the sentence goes on in lower case: "Stop!" said Pip.
        assert re.match(r'"?[A-Z]', sentence), sentence
    assert re.search(r"[.!?]\"?$", text)


def test_no_sentence_names_a_gender_itself() -> None:
    """Pronouns stand in braces, so that they are the characters'; in what somebody says of another they may not."""
    texts = re.findall(r'^(?:  |  \[)("[^"]*"|\'[^\']*\')', FILE.read_text(), re.M)
    assert len(texts) > 500
    for text in texts:
        assert not re.search(r"\b(he|she|him|her|his|hers|himself|herself)\b(?!})", text, re.I), text


def test_only_the_characters_are_of_a_kind_or_have_a_name() -> None:
    """Else a story of a bear could pass as one of a fox: a fox would run through it."""
    text = re.sub(r"^(he|she|kinds) = \"{3}[^\"]*\"{3}", "", FILE.read_text(), flags=re.M)
    words = words_of(re.sub(r"{\w+}", "", text))
    assert not [kind for kind in kinds() - {"boy"} if is_in(kind, words)]
    assert not [name for name in names() if re.search(rf"\b{name}\b", text)]


def test_the_vocabulary_is_a_small_childs() -> None:
    words = Counter()
    for index in range(4_000):
        words.update(set(re.findall(r"[a-z']+", make_story(2, index)["text"].lower())))
    assert 1_000 < len(words) < 1_500


def test_wordings_vary() -> None:
    one = plot(12345)
    assert len({tell(one, random.Random(seed), long=True) for seed in range(200)}) > 195
    begun = Counter(make_story(1, index)["text"].split()[0] for index in range(2_000))
    assert len(begun) > 50 and max(begun.values()) < 800


def test_splits_go_by_the_plot_whatever_the_seed() -> None:
    rows = [make_story(1, index, Shares(0.1, 0.2)) for index in range(5_000)]
    shares = Counter(row["split"] for row in rows)
    assert 0.08 < shares["valid"] / 5_000 < 0.12 and 0.18 < shares["test"] / 5_000 < 0.22
    assert len({row["text"] for row in rows}) == len({row["id"] for row in rows}) == 5_000
    for row, index in zip(rows, range(5_000), strict=True):
        assert row["split"] == Shares(0.1, 0.2).split_of(str(number_of(1, index)))


def test_a_smaller_world_has_so_many_of_each_list() -> None:
    told = [plot(number_of(1, index, 3), 3) for index in range(3_000)]
    assert max(len({one.hero.name for one in told if one.hero.female is she}) for she in (True, False)) == 3
    assert {len({one.chosen[name] for one in told}) for name in ("place", "weather", "sight", "treat")} == {3}
    assert len({one.hero.kind for one in told}) == 3 and len({one.scene.theme for one in told}) == 13
    assert all(
        len(told) <= 3 for scene in content(3).scenes for told in (*scene.words.values(), *scene.phrases.values())
    )
    assert content(3).words["banned"] == content().words["banned"] and 10**9 < plot_count(3) < plot_count(8)
    assert len({number_of(1, index, 3) for index in range(3_000)}) == 3_000


@given(number=INDICES, seed=st.integers(0, 99))
def test_readers_say_their_words_again(number: int, seed: int) -> None:
    one = plot(number)
    text = read_first(one, random.Random(seed))
    assert text == read_first(one, random.Random(seed))
    said = [word for word in one.chosen.values() if len(re.findall(rf"\b{word}\b", text, re.I)) >= 3]
    assert len(said) >= 2 and all(len(re.findall(rf"\b{it}\b", text)) >= 2 for it in (one.hero.name, one.hero.kind))
    assert 20 < len(text.split()) < 90 and one.friend.name not in text
    assert not re.search(r"[{}\[\]|]|  |\ba [aeiou]|\ban [^aeiou]| [,.!?]", text)
    assert all(re.match(r"[A-Z]", sentence) for sentence in re.split(r"(?<=[.!?]) ", text))


def test_only_training_rows_are_first_readers() -> None:
    rows = [make_story(1, index, Shares(0.2, 0.2), readers=0.5) for index in range(2_000)]
    assert rows == [make_story(1, index, Shares(0.2, 0.2), readers=0.5) for index in range(2_000)]
    kinds_of = Counter((row["split"], row["id"].split("_")[0]) for row in rows)
    assert set(kinds_of) == {("train", "reader"), ("train", "story"), ("valid", "story"), ("test", "story")}
    assert 0.44 < kinds_of["train", "reader"] / (kinds_of["train", "reader"] + kinds_of["train", "story"]) < 0.56


def test_files_are_the_rows_and_are_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["data", "stories", "--output-dir", str(tmp_path), "--rows", "300", "--seed", "4", "--quiet"]
    command += ["--valid-fraction", "0.1", "--test-fraction", "0.1"]
    assert main(command) == 0
    read = [json.loads(line) for split in ("train", "valid", "test") for line in (tmp_path / f"{split}.jsonl").open()]
    made = [make_story(4, index, Shares(0.1, 0.1)) for index in range(300)]
    assert sorted(read, key=lambda row: row["id"]) == made
    assert all(row["split"] == "valid" for row in map(json.loads, (tmp_path / "valid.jsonl").open()))
    assert main(command) == 0 and "done and valid" in capsys.readouterr().out
    with pytest.raises(NotOursError, match="seed: 4 -> 5"):
        corpus.generate(tmp_path, rows=300, seed=5, shares=Shares(0.1, 0.1))


@pytest.mark.parametrize(
    ("words", "named"),
    [(["--rows", "0"], "--rows"), (["--valid-fraction", "0.6", "--test-fraction", "0.5"], "--valid-fraction")],
)
def test_what_cannot_be_made_is_refused(
    tmp_path: Path, words: list[str], named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["data", "stories", "--output-dir", str(tmp_path / "out"), *words]) == 2
    assert named in capsys.readouterr().err and not (tmp_path / "out").exists()
    with pytest.raises(DataError, match="no story"):
        number_of(1, plot_count())
