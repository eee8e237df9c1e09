"""Generated rows: deterministic, right, of SYNTH's schema, and no question in two splits whatever the fraction."""

import hashlib
import json
import re
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe.cli import main
from vpmoe.data_curation.conversations.synth import COLUMNS, to_conversation
from vpmoe.data_curation.datasets.plan import split_of
from vpmoe.data_curation.tasks import synth_mini
from vpmoe.data_curation.tasks.family import BUCKETS
from vpmoe.data_curation.tasks.registry import FAMILIES
from vpmoe.data_curation.tasks.synth_mini import check, make_row, parse_mix
from vpmoe.errors import DataError, NotOursError
from vpmoe.harmony.prompts import Prompts
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

QUICKSTART = {"addition": 0.3, "subtraction": 0.3, "maximum": 0.15, "sorting": 0.25}
EVEN = dict.fromkeys(QUICKSTART, 1.0)


def numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]


def question(row: dict) -> tuple[str, tuple[int, ...]]:
    """Family and operands without their order: what may not be shared between splits."""
    return row["exercise"], tuple(sorted(numbers(row["query"])))


def right_answer(row: dict) -> str:
    asked = numbers(row["query"])
    match row["exercise"]:
        case "addition":
            return str(asked[0] + asked[1])
        case "subtraction":
            return str(max(asked) - min(asked))
        case "maximum":
            return str(max(asked))
        case "sorting":
            return " ".join(map(str, sorted(asked)))
        case other:
            raise AssertionError(other)


@given(seed=st.integers(0, 10), index=st.integers(0, 10**8 - 1))
def test_rows_are_right_and_complete(seed: int, index: int) -> None:
    row = make_row(seed, index, EVEN)
    assert row == make_row(seed, index, EVEN)
    assert tuple(sorted(row)) == tuple(sorted(COLUMNS)) and all(isinstance(value, str) for value in row.values())
    assert row["synthetic_answer"] == right_answer(row)
    assert check(f" {right_answer(row)}\n", row) and not check(right_answer(row) + "0", row) and not check("", row)
    # The derivation ends with the digits that the answer joins.
    spelled = row["synthetic_reasoning"].splitlines()[-1]
    assert re.sub(r"\D", "", spelled).lstrip("0") == re.sub(r"\D", "", right_answer(row)).lstrip("0")


@given(index=st.integers(0, 10**8 - 1))
def test_every_step_of_an_addition_is_true(index: int) -> None:
    row = make_row(3, index, {"addition": 1})
    _, ones, tens, _ = row["synthetic_reasoning"].splitlines()
    for line in (ones, tens):
        left, right = line.split(" ", 1)[1].split("=")
        assert sum(numbers(left)) == int(right.replace(" ", ""))
    carry = numbers(tens)[2]
    assert carry == (sum(numbers(ones)[:2]) >= 10)


def test_no_question_is_in_two_splits() -> None:
    rows = [make_row(1, index, EVEN) for index in range(6000)]
    held_out = {question(row) for row in synth_mini.test_rows(EVEN, seed=1)}
    assert not held_out & {question(row) for row in rows}
    for buckets in (1, 4):
        fraction = buckets / BUCKETS
        parts = {"train": set(), "valid": set()}
        for row in rows:
            parts[split_of(row["synth_id"], fraction)].add(question(row))
        assert not parts["train"] & parts["valid"]
        assert len(parts["valid"]) > 0.5 * fraction * len(parts["train"])


def test_the_test_questions_are_a_tenth_of_each_family_whatever_the_seed() -> None:
    first, second = (list(synth_mini.test_rows(EVEN, seed)) for seed in (1, 2))
    assert {question(row) for row in first} == {question(row) for row in second}
    assert len({row["synth_id"] for row in first}) == len(first)
    for name in EVEN:
        share = sum(row["exercise"] == name for row in first) / len(FAMILIES[name].instances)
        assert 0.07 < share < 0.13
    assert {row["exercise"] for row in first[:40]} == set(EVEN), "families are interleaved"


def test_the_mix_is_followed() -> None:
    rows = [make_row(5, index, parse_mix("addition=3,maximum=1")) for index in range(2000)]
    share = sum(row["exercise"] == "addition" for row in rows) / len(rows)
    assert 0.7 < share < 0.8 and {row["exercise"] for row in rows} == {"addition", "maximum"}
    assert {row["constraints"] for row in rows} == {"carry", "no carry", "tens differ", "same tens"}


def test_supervised_parts_are_short() -> None:
    renderer = FastRenderer(load_o200k_harmony())
    for index in range(500):
        rendered = renderer.render(to_conversation(make_row(1, index, EVEN), Prompts()).messages)
        assert len(rendered.messages[-1]) + len(rendered.messages[-2]) <= 60


def test_files_are_deterministic_and_left_alone_when_right(rows_dir: Path, tmp_path: Path) -> None:
    mix = parse_mix(synth_mini.DEFAULT_MIX)
    made = synth_mini.generate(tmp_path, rows=400, seed=7, families=mix)
    assert {path.name for path in tmp_path.iterdir()} == {"rows_00.parquet", "test.jsonl", "receipt.json"}
    for name in ("rows_00.parquet", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (rows_dir / name).read_bytes()
    said: list[str] = []
    assert synth_mini.generate(tmp_path, rows=400, seed=7, families=mix, say=said.append) == made
    assert said == [f"{tmp_path}: done and valid"]
    assert made == {"rows": 400, "test_questions": (tmp_path / "test.jsonl").read_bytes().count(b"\n")}
    rows = pq.read_table(tmp_path / "rows_00.parquet").to_pylist()
    assert rows == [make_row(7, index, mix) for index in range(400)]
    assert all(check(row["synthetic_answer"], row) for row in map(json.loads, (tmp_path / "test.jsonl").open()))


def test_the_quickstart_rows_never_change() -> None:
    """Its measured results are of these rows; whoever changes them measures again."""
    rows = hashlib.sha256()
    for index in range(30_000):
        rows.update(json.dumps(make_row(1, index, QUICKSTART), sort_keys=True).encode() + b"\n")
    assert rows.hexdigest() == "b7fe92c40b927dc148cf3d9700cb91367bb0ad8cbd169e9a89adb4a97ae081fb"
    tests = "".join(json.dumps(row) + "\n" for row in synth_mini.test_rows(QUICKSTART, 1))
    digest = hashlib.sha256(tests.encode()).hexdigest()
    assert digest == "349c4ae20bfcb003cd583ee432802d9cde17481eaeaeccfd0a579a18d3cd6642"


def test_the_quickstart_files_never_change(tmp_path: Path) -> None:
    arguments = ["--rows", "100", "--families", ",".join(f"{name}={share}" for name, share in QUICKSTART.items())]
    assert main(["data", "synth-mini", "--output-dir", str(tmp_path), *arguments]) == 0
    digest = hashlib.sha256((tmp_path / "test.jsonl").read_bytes()).hexdigest()
    assert digest == "349c4ae20bfcb003cd583ee432802d9cde17481eaeaeccfd0a579a18d3cd6642"


def test_levels_and_languages_come_when_asked(tmp_path: Path) -> None:
    options = {"rows": 60, "seed": 1, "families": {"dates": 1.0, "units": 1.0}}
    asked = {"levels": {"dates": ("weekday",)}, "languages": ("de", "fr")}
    assert synth_mini.generate(tmp_path, **options, **asked) == synth_mini.generate(tmp_path, **options, **asked)
    rows = pq.read_table(tmp_path / "rows_00.parquet").to_pylist()
    assert {row["language"] for row in rows} == {"de", "fr"}
    assert {row["constraints"] for row in rows if row["exercise"] == "dates"} == {"weekday"}
    assert {row["constraints"] for row in rows} > {"weekday", "back"}
    with pytest.raises(NotOursError, match=r"levels\.dates: .*weekday.* -> .*languages: \['de', 'fr'\] -> \['en'\]"):
        synth_mini.generate(tmp_path, **options)


def test_slips_change_digits_alone_as_often_as_asked() -> None:
    texts = [[make_row(1, index, {"sorting": 1.0}, slips=slips) for index in range(300)] for slips in (0.0, 0.2)]
    changed = digits = 0
    for right, slipped in zip(*texts, strict=True):
        assert right["query"] == slipped["query"]
        for name in ("synthetic_reasoning", "synthetic_answer"):
            assert len(right[name]) == len(slipped[name])
            for before, after in zip(right[name], slipped[name], strict=True):
                assert before == after or (before.isdecimal() and after.isdecimal())
                digits += before.isdecimal()
                changed += before != after
    assert 0.17 < changed / digits < 0.19  # a tenth of the digits that are drawn is the right one


@pytest.mark.parametrize(
    ("option", "chosen", "named"),
    [
        ("--levels", "dates=weekday", "not in the mix"),
        ("--levels", "addition=hard", "no carry | carry"),
        ("--levels", "addition=carry|carry", "each once"),
        ("--levels", "addition", "not a choice"),
        ("--languages", "en,xx", "'en | xx'"),
        ("--languages", "", "of: en | de | fr"),
        ("--slips", "1.5", "0 to 1"),
    ],
)
def test_a_wrong_choice_is_refused(
    tmp_path: Path, option: str, chosen: str, named: str, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--output-dir", str(tmp_path), "--families", "addition=1", option, chosen]
    assert main(["data", "synth-mini", *words]) == 2
    complaint = capsys.readouterr().err
    assert option in complaint and named in complaint and not list(tmp_path.iterdir())


def test_other_or_damaged_rows_are_not_taken_for_the_asked_ones(tmp_path: Path) -> None:
    mix = {"sorting": 1.0}
    synth_mini.generate(tmp_path, rows=20, seed=7, families=mix)
    with pytest.raises(NotOursError, match="seed: 7 -> 8"):
        synth_mini.generate(tmp_path, rows=20, seed=8, families=mix)
    tests = (tmp_path / "test.jsonl").read_text()
    (tmp_path / "test.jsonl").write_text(tests.replace("1", "2", 1))
    with pytest.raises(NotOursError, match=r"test\.jsonl"):
        synth_mini.generate(tmp_path, rows=20, seed=7, families=mix)
    assert synth_mini.generate(tmp_path, rows=20, seed=8, families=mix, overwrite=True)


@pytest.mark.parametrize("mix", ["addition", "addition=x", "cooking=1", "addition=-1", "addition=0", ""])
def test_a_wrong_mix_is_refused(tmp_path: Path, mix: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "synth-mini", "--output-dir", str(tmp_path), "--families", mix]) == 2
    assert "--families" in capsys.readouterr().err


def test_answers_of_other_rows_cannot_be_checked() -> None:
    with pytest.raises(DataError, match="'memorization'"):
        check("1", {"exercise": "memorization", "synthetic_answer": "1"})
