"""Rows of SYNTH's schema out of nothing: small tasks with a written derivation and an answer that can be checked.

``vpmoe data synth-mini`` writes ``rows_00.parquet`` (what is trained and validated on) and ``test.jsonl`` (held-out
questions). A row is a pure function of seed and index. No question (whatever its wording, its language and the
order of its operands) is in two of train, valid and test:

- test: a fixed tenth of each family's questions, by a hash of what is asked; no row of the pool asks one of them.
- train or valid: the builder decides by a hash of ``synth_id``. The id comes first here, its hash names one of 20
  buckets, and the question is drawn from the questions of that bucket. Any ``--valid-fraction`` that is a multiple of
  1/20 therefore splits the questions as well as the rows.

``docs/synth_mini.md`` is the datasheet: families, levels, languages, sizes.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vpmoe.files import json_line, write_atomically
from vpmoe import steps
from vpmoe.data_curation.conversations.synth import COLUMNS, HELD_OUT_NAME
from vpmoe.data_curation.tasks.family import BUCKETS, LANGUAGES, Family, Instance, bucket_of
from vpmoe.data_curation.tasks.registry import FAMILIES
from vpmoe.errors import DataError

VALID_FRACTION = 1 / BUCKETS
DEFAULT_MIX = "addition=0.7,subtraction=0.1,maximum=0.1,sorting=0.1"
DEFAULT_LANGUAGES = ("en",)
TEST_NAME = HELD_OUT_NAME
POOL_NAME = "rows_00.parquet"
_VERSION = 2
"""Of the rows' texts."""
_DRAWS = 1
"""Of what is drawn; it seeds every draw, so a change of wording alone leaves questions and their split as they are."""
_ALL_LEVELS: Mapping[str, tuple[str, ...]] = {}


def check(answer: str, row: Mapping[str, Any]) -> bool:
    """Whether ``answer`` is exactly the answer to the row's question (blanks around it do not count).

    Raises:
        DataError: the row is not of one of the families here, so its answer can not be checked.
    """
    if row.get("exercise") not in FAMILIES:
        raise DataError(
            f"no way to check an answer of the family {row.get('exercise')!r}",
            source=f"row {row.get('synth_id')}",
            remedy=f"check rows of {', '.join(FAMILIES)}",
        )
    return answer.strip() == row["synthetic_answer"]


def make_row(
    seed: int,
    index: int,
    families: Mapping[str, float],
    levels: Mapping[str, tuple[str, ...]] = _ALL_LEVELS,
    languages: Sequence[str] = DEFAULT_LANGUAGES,
    slips: float = 0.0,
) -> dict[str, str]:
    """Row ``index`` of the pool that ``seed`` and a mix define.

    Args:
        seed, index: which row.
        families: name -> weight.
        levels: family -> the levels to take; a family that is not named takes all of its own.
        languages: each row is in one of them, all equally often.
        slips: share of the digits of derivation and answer in whose place any digit stands; question and wording are
            what they are without.
    """
    synth_id = f"synth_mini_{seed}_{index:08d}"
    rng = random.Random(f"{_DRAWS} {synth_id}")
    (name,) = rng.choices(list(families), list(families.values()))
    family = FAMILIES[name]
    # One language takes no draw: rows of English alone are what they were before there were others.
    language = languages[0] if len(languages) == 1 else rng.choice(languages)
    instance = family.ask(bucket_of(synth_id), levels.get(name, family.levels), rng)
    row = _row(synth_id, family, instance, language, rng)
    if slips:
        rng = random.Random(f"slips {synth_id}")
        for name in ("synthetic_reasoning", "synthetic_answer"):
            row[name] = "".join(
                rng.choice("0123456789") if each.isdecimal() and rng.random() < slips else each for each in row[name]
            )
    return row


def test_rows(
    families: Mapping[str, float],
    seed: int,
    levels: Mapping[str, tuple[str, ...]] = _ALL_LEVELS,
    languages: Sequence[str] = DEFAULT_LANGUAGES,
) -> Iterator[dict[str, str]]:
    """The held-out questions of families and levels, each once in every language.

    Families are interleaved, each shuffled by ``seed``; which questions they are does not depend on it.
    """
    rng = random.Random(f"{_DRAWS} test {seed}")
    rows: list[tuple[float, dict[str, str]]] = []
    for name in families:
        family = FAMILIES[name]
        held_out = family.held_out(levels.get(name, family.levels))
        rng.shuffle(held_out)
        for index, instance in enumerate(held_out):
            for language in languages:
                suffix = "" if language == "en" else f"_{language}"
                synth_id = f"synth_mini_test_{name}_{family.label(instance)}{suffix}"
                rows.append((index / len(held_out), _row(synth_id, family, instance, language, rng)))
    yield from (row for _, row in sorted(rows, key=lambda placed: placed[0]))


def generate(
    output_dir: Path,
    *,
    rows: int,
    seed: int,
    families: Mapping[str, float],
    levels: Mapping[str, tuple[str, ...]] = _ALL_LEVELS,
    languages: Sequence[str] = DEFAULT_LANGUAGES,
    slips: float = 0.0,
    overwrite: bool = False,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write the pool and the test questions, unless they are there; returns how many (``rows``, ``test_questions``).

    Raises:
        DataError: an unknown family, level or language, a weight or slips that are no share, or no rows.
        NotOursError, BusyError: see :func:`vpmoe.steps.run`.
    """
    _check_choice(families, levels, languages)
    if rows < 1:
        raise DataError(f"{rows} rows", source="--rows", remedy="ask for at least 1")
    if not 0 <= slips <= 1:
        raise DataError(f"{slips} is no share", source="--slips", remedy="ask for 0 to 1 of the digits")
    decides: dict[str, Any] = {
        "rows": rows,
        "seed": seed,
        "families": dict(families),
        "levels": {name: list(levels.get(name, FAMILIES[name].levels)) for name in families},
        "languages": list(languages),
        **({"slips": slips} if slips else {}),
    }

    def make(work: steps.Work) -> dict[str, Any]:
        columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
        for index in range(rows):
            for name, value in make_row(seed, index, families, levels, languages, slips).items():
                columns[name].append(value)
        schema = pa.schema([(name, pa.string()) for name in COLUMNS])
        pq.write_table(pa.table(columns, schema=schema), work.folder / POOL_NAME)
        tests = [json_line(row) for row in test_rows(families, seed, levels, languages)]
        write_atomically(work.folder / TEST_NAME, "".join(tests).encode())
        return {"rows": rows, "test_questions": len(tests)}

    step = steps.Step("synth_mini", _VERSION, output_dir, decides, packages=("pyarrow",))
    return steps.run(step, make, overwrite=overwrite, check_hashes=True, say=say)["report"]


def _row(synth_id: str, family: Family, instance: Instance, language: str, rng: random.Random) -> dict[str, str]:
    worked = family.work(instance, rng, language)
    return {
        "synth_id": synth_id,
        "language": language,
        "exercise": family.name,
        "model": f"synth_mini {_VERSION}",
        "constraints": family.level_of(instance),
        "seed_license": "CC0-1.0",
        "query_seed_url": "",
        "query": worked.query,
        "synthetic_reasoning": worked.reasoning,
        "synthetic_answer": worked.answer,
    }


def _check_choice(
    families: Mapping[str, float], levels: Mapping[str, tuple[str, ...]], languages: Sequence[str]
) -> None:
    if not families.keys() <= FAMILIES.keys() or min(families.values(), default=-1) < 0 or not sum(families.values()):
        raise DataError(
            f"the mix {dict(families)} has unknown families or weights that are no shares",
            source="--families",
            remedy=f"write name=weight,name=weight with names of {', '.join(FAMILIES)}",
        )
    for name, chosen in levels.items():
        if name not in families:
            raise DataError(
                f"levels of {name!r}, which is not in the mix", source="--levels", remedy="name it in --families too"
            )
        _check_named_once(f"{name} has no such choice of levels", "--levels", chosen, FAMILIES[name].levels)
    _check_named_once("no such choice of languages", "--languages", languages, LANGUAGES)


def _check_named_once(what: str, source: str, chosen: Sequence[str], known: Sequence[str]) -> None:
    if not chosen or len(set(chosen)) < len(chosen) or not set(chosen) <= set(known):
        raise DataError(
            f"{what}: {' | '.join(chosen)!r}", source=source, remedy=f"name each once, of: {' | '.join(known)}"
        )


def parse_mix(text: str) -> dict[str, float]:
    """``addition=0.7,sorting=0.3`` as a mapping; raises :class:`DataError` if it is not of that form."""
    try:
        return {name.strip(): float(weight) for name, weight in (item.split("=") for item in text.split(","))}
    except ValueError as error:
        raise DataError(
            f"not a mix of families: {text!r}", source="--families", remedy="write for example addition=0.7,sorting=0.3"
        ) from error


def parse_levels(text: str) -> dict[str, tuple[str, ...]]:
    """``multiplication=2 digits,dates=weekday|days later`` as a mapping; empty text is no restriction.

    Raises:
        DataError: the text is not of that form.
    """
    try:
        items = [item.split("=") for item in text.split(",") if text]
        return {name.strip(): tuple(level.strip() for level in chosen.split("|")) for name, chosen in items}
    except ValueError as error:
        raise DataError(
            f"not a choice of levels: {text!r}",
            source="--levels",
            remedy="write for example 'multiplication=2 digits,dates=weekday|days later'",
        ) from error


def parse_languages(text: str) -> tuple[str, ...]:
    """``en,de`` as a tuple."""
    return tuple(each.strip() for each in text.split(","))
