"""Blends in the configuration: written as a list, in a file or as a flag, checked as a whole."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_vpmoe.config import load_config, provenance_diff
from megatron_vpmoe.errors import ConfigError

Write = Callable[..., Path]
TWO = "[{path: a/x, weight: 0.7}, {path: b/y, weight: 0.3}]"


def load(small: Path, blend: str, schedule: str = "null", data_path: str = "null"):
    return load_config(small, ["--data-path", data_path, "--blend", blend, "--blend-schedule", schedule])


def test_a_flag_and_a_file_say_the_same(small: Path, child: Write) -> None:
    path = child(f"data:\n  data_path: null\n  blend: {TWO}\n  blend_schedule: [{{from_sample: 9, weights: [1, 2]}}]\n")
    by_flag = load(small, TWO, "[{from_sample: 9, weights: [1, 2]}]")
    assert load_config(path).data == by_flag.data
    assert [(part.label, part.weight) for part in by_flag.data.parts] == [("x", 0.7), ("y", 0.3)]


def test_one_dataset_is_a_blend_of_one(small: Path) -> None:
    assert [part.path for part in load_config(small, ["--data-path", "d"]).data.parts] == ["d"]


@pytest.mark.parametrize(
    ("blend", "schedule", "data_path", "expected"),
    [
        (TWO, "null", "d", "both are given"),
        ("null", "null", "null", "neither is given"),
        ("null", "[{from_sample: 1, weights: [1]}]", "d", "needs a blend"),
        ("[]", "null", "null", "names no dataset"),
        ("[{path: a, weight: 1}, {path: ./a, weight: 2}]", "null", "null", "the dataset a is listed twice"),
        ("[{path: a/x, weight: 1}, {path: b/x, weight: 2}]", "null", "null", "two datasets are called x"),
        ("[{path: a, weight: 1}, {path: b, weight: 0}]", "null", "null", "the weight of b is never above 0"),
        ("[{path: a, weight: 0}]", "null", "null", "every weight is 0"),
        ("[{path: a, weight: -1}]", "null", "null", "data.blend[0].weight = -1 must be at least 0"),
        ("[{path: a}]", "null", "null", "data.blend[0].weight is missing"),
        ("[{path: a, weight: 1, wieght: 2}]", "null", "null", "unknown key data.blend[0].wieght"),
        ("[a, b]", "null", "null", "data.blend[0] = 'a'"),
        ("a", "null", "null", "data.blend = 'a' (str), expected a list or null"),
        (TWO, "[{from_sample: 9, weights: [1]}]", "null", "from sample 9: 1 weights for 2 datasets"),
        (TWO, "[{from_sample: 9, weights: [0, 0]}]", "null", "from sample 9: every weight is 0"),
        (TWO, "[{from_sample: 0, weights: [1, 1]}]", "null", "data.blend_schedule[0].from_sample = 0"),
        (
            TWO,
            "[{from_sample: 9, weights: [1, 1]}, {from_sample: 9, weights: [1, 2]}]",
            "null",
            "from_sample 9 follows 9",
        ),
    ],
)
def test_what_is_wrong_is_named(small: Path, blend: str, schedule: str, data_path: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(small, blend, schedule, data_path)
    assert expected in str(caught.value)


@pytest.mark.parametrize(("blend", "data_path", "skips"), [(TWO, "null", "[3]"), ("null", "d", "[1, 2]")])
def test_each_dataset_has_its_own_rows_to_skip(small: Path, blend: str, data_path: str, skips: str) -> None:
    flags = ["--data-path", data_path, "--blend", blend, "--skip-rows", skips]
    with pytest.raises(ConfigError, match=r"skip_rows.*one number for each"):
        load_config(small, flags)


def test_weights_and_schedule_bind_and_paths_do_not(small: Path) -> None:
    old = load(small, TWO).model_dump()
    moved = load(small, TWO.replace("a/x", "elsewhere/x")).model_dump()
    reweighed = load(small, TWO.replace("0.7", "0.6")).model_dump()
    assert provenance_diff(old, moved) == []
    assert [change.key for change in provenance_diff(old, reweighed)] == ["data.blend"]
    scheduled = load(small, TWO, "[{from_sample: 9, weights: [1, 2]}]").model_dump()
    assert [change.key for change in provenance_diff(old, scheduled)] == ["data.blend_schedule"]


def test_a_checkpoint_from_before_blends_continues(small: Path) -> None:
    new = load_config(small).model_dump()
    old = {**new, "data": {key: value for key, value in new["data"].items() if not key.startswith(("blend", "skip"))}}
    assert provenance_diff(old, new) == []
