"""Rows of SYNTH's schema out of nothing: small tasks with a written derivation and an answer that can be checked.

    python -m vpmoe.data_curation.tasks.synth_mini --output-dir data/synth_mini --rows 20000 --seed 1

writes ``rows_00.parquet`` (what is trained and validated on), ``test.jsonl`` (held-out questions) and, last,
``synth_mini.json``. A row is a pure function of seed and index. No question (whatever its wording, its language and the
order of its operands) is in two of train, valid and test:

- test: a fixed tenth of each family's questions, by a hash of what is asked; no row of the pool asks one of them.
- train or valid: the builder decides by a hash of ``synth_id``. The id comes first here, its hash names one of 20
  buckets, and the question is drawn from the questions of that bucket. Any ``--valid-fraction`` that is a multiple of
  1/20 therefore splits the questions as well as the rows.

``docs/synth_mini.md`` is the datasheet: families, levels, languages, sizes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from megatron_vpmoe.files import file_entry, json_bytes, move_into_place, write_atomically
from vpmoe.data_curation.manifest import check_file
from vpmoe.data_curation.rows.synth import COLUMNS
from vpmoe.data_curation.tasks.family import BUCKETS, LANGUAGES, Family, Instance, bucket_of
from vpmoe.data_curation.tasks.registry import FAMILIES
from vpmoe.errors import DataError, VpmoeError

VALID_FRACTION = 1 / BUCKETS
DEFAULT_MIX = "addition=0.7,subtraction=0.1,maximum=0.1,sorting=0.1"
DEFAULT_LANGUAGES = ("en",)
RECORD_NAME = "synth_mini.json"
TEST_NAME = "test.jsonl"
POOL_NAME = "rows_00.parquet"
_VERSION = 1
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
) -> dict[str, str]:
    """Row ``index`` of the pool that ``seed`` and a mix define.

    Args:
        seed, index: which row.
        families: name -> weight.
        levels: family -> the levels to take; a family that is not named takes all of its own.
        languages: each row is in one of them, all equally often.
    """
    synth_id = f"synth_mini_{seed}_{index:08d}"
    rng = random.Random(f"{_VERSION} {synth_id}")
    (name,) = rng.choices(list(families), list(families.values()))
    family = FAMILIES[name]
    # One language takes no draw: rows of English alone are what they were before there were others.
    language = languages[0] if len(languages) == 1 else rng.choice(languages)
    instance = family.ask(bucket_of(synth_id), levels.get(name, family.levels), rng)
    return _row(synth_id, family, instance, language, rng)


def test_rows(
    families: Mapping[str, float],
    seed: int,
    levels: Mapping[str, tuple[str, ...]] = _ALL_LEVELS,
    languages: Sequence[str] = DEFAULT_LANGUAGES,
) -> Iterator[dict[str, str]]:
    """The held-out questions of families and levels, each once in every language.

    Families are interleaved, each shuffled by ``seed``; which questions they are does not depend on it.
    """
    rng = random.Random(f"{_VERSION} test {seed}")
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
    overwrite: bool = False,
) -> bool:
    """Write the pool, the test questions and the record; False if they were there already, as asked for.

    Raises:
        DataError: an unknown family, level or language, a weight that is no share, no rows, or other rows in the
            folder.
    """
    _check_mix(families)
    _check_levels(families, levels)
    _check_languages(languages)
    if rows < 1:
        raise DataError(f"{rows} rows", source="--rows", remedy="ask for at least 1")
    asked: dict[str, Any] = {"version": _VERSION, "rows": rows, "seed": seed, "families": dict(families)}
    if levels:
        asked["levels"] = {name: list(chosen) for name, chosen in levels.items()}
    if tuple(languages) != DEFAULT_LANGUAGES:
        asked["languages"] = list(languages)
    record_path = output_dir / RECORD_NAME
    if record_path.exists() and not overwrite:
        _check_present(record_path, asked)
        return False
    record_path.unlink(missing_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    for index in range(rows):
        for name, value in make_row(seed, index, families, levels, languages).items():
            columns[name].append(value)
    pool = output_dir / POOL_NAME
    temporary = pool.with_name(f".{pool.name}.tmp")
    pq.write_table(pa.table(columns, schema=pa.schema([(name, pa.string()) for name in COLUMNS])), temporary)
    move_into_place(temporary, pool)
    tests = "".join(json.dumps(row) + "\n" for row in test_rows(families, seed, levels, languages))
    write_atomically(output_dir / TEST_NAME, tests.encode())
    files = {name: file_entry(output_dir / name) for name in (POOL_NAME, TEST_NAME)}
    write_atomically(record_path, json_bytes(asked | {"valid_fraction": VALID_FRACTION, "files": files}))
    return True


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


def _check_mix(families: Mapping[str, float]) -> None:
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families or any(weight < 0 for weight in families.values()) or not sum(families.values()):
        raise DataError(
            f"the mix {dict(families)} has unknown families or weights that are no shares",
            source="--families",
            remedy=f"write name=weight,name=weight with names of {', '.join(FAMILIES)}",
        )


def _check_levels(families: Mapping[str, float], levels: Mapping[str, tuple[str, ...]]) -> None:
    for name, chosen in levels.items():
        if name not in families:
            raise DataError(
                f"levels of {name!r}, which is not in the mix", source="--levels", remedy="name it in --families too"
            )
        known = FAMILIES[name].levels
        if not chosen or len(set(chosen)) < len(chosen) or any(level not in known for level in chosen):
            raise DataError(
                f"{name} has no such choice of levels: {' | '.join(chosen)!r}",
                source="--levels",
                remedy=f"name each once, of: {' | '.join(known)}",
            )


def _check_languages(languages: Sequence[str]) -> None:
    if not languages or len(set(languages)) < len(languages) or any(each not in LANGUAGES for each in languages):
        raise DataError(
            f"no such choice of languages: {','.join(languages)!r}",
            source="--languages",
            remedy=f"name each once, of {', '.join(LANGUAGES)}",
        )


def _check_present(record_path: Path, asked: dict[str, Any]) -> None:
    record = json.loads(record_path.read_bytes())
    options = {key: value for key, value in record.items() if key not in ("valid_fraction", "files")}
    different = [key for key in options | asked if options.get(key) != asked.get(key)]
    remedy = "pass --overwrite to write the rows again, or another --output-dir"
    if different:
        raise DataError(
            f"the folder holds rows of another {', '.join(different)}", source=str(record_path), remedy=remedy
        )
    for name, entry in record["files"].items():
        check_file(record_path.parent / name, entry, remedy=remedy)


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


def report(output_dir: Path, rows: int, made: bool) -> str:
    """What :func:`generate` left in ``output_dir``, in two lines."""
    tests = (output_dir / TEST_NAME).read_bytes().count(b"\n")
    return (
        f"{output_dir}: {rows:,} rows, {tests:,} test questions{'' if made else ', already there'}\n"
        f"  build with --valid-fraction {VALID_FRACTION} (or another multiple of it): then no question is in two splits"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 with a message that names the fault and the remedy."""
    parser = argparse.ArgumentParser(
        prog="python -m vpmoe.data_curation.tasks.synth_mini", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--families", default=DEFAULT_MIX, help=f"name=weight,...; default {DEFAULT_MIX}")
    parser.add_argument("--levels", default="", help="family=level|level,...; default: every level")
    parser.add_argument("--languages", default="en", help=f"of {','.join(LANGUAGES)}; default en")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args(argv)
    try:
        made = generate(
            options.output_dir,
            rows=options.rows,
            seed=options.seed,
            families=parse_mix(options.families),
            levels=parse_levels(options.levels),
            languages=parse_languages(options.languages),
            overwrite=options.overwrite,
        )
    except VpmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(report(options.output_dir, options.rows, made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
