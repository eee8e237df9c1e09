"""Rows of SYNTH's schema out of nothing: arithmetic with a written derivation and an answer that can be checked.

    python -m vpmoe.data_curation.synth_mini --output-dir data/synth_mini --rows 20000 --seed 1

writes ``rows_00.parquet`` (what is trained and validated on), ``test.jsonl`` (held-out questions) and, last,
``synth_mini.json``. A row is a pure function of seed and index. No question (whatever the order of its operands) is in
two of train, valid and test:

- test: a fixed tenth of each family's questions, by a hash of the operands; no row of the pool asks one of them.
- train or valid: the builder decides by a hash of ``synth_id``. The id comes first here, its hash names one of 20
  buckets, and the question is drawn from the questions of that bucket. Any ``--valid-fraction`` that is a multiple of
  1/20 therefore splits the questions as well as the rows.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from vpmoe.data_curation.manifest import check_file, file_entry
from vpmoe.data_curation.mini_tasks import FAMILIES, Family, Operands, Worked
from vpmoe.data_curation.synth_rows import COLUMNS
from vpmoe.errors import DataError, VpmoeError
from vpmoe.files import json_bytes, move_into_place, write_atomically

BUCKETS = 20
VALID_FRACTION = 1 / BUCKETS
TEST_FRACTION = 0.1
DEFAULT_MIX = "addition=0.7,subtraction=0.1,maximum=0.1,sorting=0.1"
RECORD_NAME = "synth_mini.json"
TEST_NAME = "test.jsonl"
POOL_NAME = "rows_00.parquet"
_VERSION = 1


def check(row: Mapping[str, Any], text: str) -> bool:
    """Whether ``text`` is exactly the answer to the row's question (blanks around it do not count).

    Raises:
        DataError: the row is not of one of the families here, so its answer can not be checked.
    """
    if row.get("exercise") not in FAMILIES:
        raise DataError(
            f"no way to check an answer of the family {row.get('exercise')!r}",
            source=f"row {row.get('synth_id')}",
            remedy=f"check rows of {', '.join(FAMILIES)}",
        )
    return text.strip() == row["synthetic_answer"]


def make_row(seed: int, index: int, families: Mapping[str, float]) -> dict[str, str]:
    """Row ``index`` of the pool that ``seed`` and the mix of ``families`` (name -> weight) define."""
    synth_id = f"synth_mini_{seed}_{index:08d}"
    rng = random.Random(f"{_VERSION} {synth_id}")
    (name,) = rng.choices(list(families), list(families.values()))
    questions = _pool_questions(name)[_bucket(synth_id)]
    return _row(synth_id, FAMILIES[name], FAMILIES[name].work(rng.choice(questions), rng))


def test_rows(families: Mapping[str, float], seed: int) -> Iterator[dict[str, str]]:
    """Every held-out question of the families once, families interleaved, each family shuffled by ``seed``."""
    rng = random.Random(f"{_VERSION} test {seed}")
    rows: list[tuple[float, dict[str, str]]] = []
    for name in families:
        held_out = [operands for operands in FAMILIES[name].operands if _is_test(name, operands)]
        rng.shuffle(held_out)
        for index, operands in enumerate(held_out):
            synth_id = f"synth_mini_test_{name}_{'_'.join(map(str, operands))}"
            row = _row(synth_id, FAMILIES[name], FAMILIES[name].work(operands, rng))
            rows.append((index / len(held_out), row))
    yield from (row for _, row in sorted(rows, key=lambda placed: placed[0]))


def generate(output_dir: Path, *, rows: int, seed: int, families: Mapping[str, float], overwrite: bool = False) -> bool:
    """Write the pool, the test questions and the record; False if they were there already, as asked for.

    Raises:
        DataError: an unknown family, a weight that is no share, no rows, or other rows in the folder.
    """
    _check_mix(families)
    if rows < 1:
        raise DataError(f"{rows} rows", source="--rows", remedy="ask for at least 1")
    asked = {"version": _VERSION, "rows": rows, "seed": seed, "families": dict(families)}
    record_path = output_dir / RECORD_NAME
    if record_path.exists() and not overwrite:
        _check_present(record_path, asked)
        return False
    record_path.unlink(missing_ok=True)
    output_dir.mkdir(parents=True, exist_ok=True)
    columns: dict[str, list[str]] = {name: [] for name in COLUMNS}
    for index in range(rows):
        for name, value in make_row(seed, index, families).items():
            columns[name].append(value)
    pool = output_dir / POOL_NAME
    temporary = pool.with_name(f".{pool.name}.tmp")
    pq.write_table(pa.table(columns, schema=pa.schema([(name, pa.string()) for name in COLUMNS])), temporary)
    move_into_place(temporary, pool)
    tests = "".join(json.dumps(row) + "\n" for row in test_rows(families, seed))
    write_atomically(output_dir / TEST_NAME, tests.encode())
    files = {name: file_entry(output_dir / name) for name in (POOL_NAME, TEST_NAME)}
    write_atomically(record_path, json_bytes(asked | {"valid_fraction": VALID_FRACTION, "files": files}))
    return True


def _row(synth_id: str, family: Family, worked: Worked) -> dict[str, str]:
    return {
        "synth_id": synth_id,
        "language": "en",
        "exercise": family.name,
        "model": f"synth_mini {_VERSION}",
        "constraints": worked.level,
        "seed_license": "CC0-1.0",
        "query_seed_url": "",
        "query": worked.query,
        "synthetic_reasoning": worked.reasoning,
        "synthetic_answer": worked.answer,
    }


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")


def _bucket(text: str) -> int:
    return _hash(text) * BUCKETS >> 64


def _is_test(name: str, operands: Operands) -> bool:
    return _hash(f"synth_mini test {name} {operands}") < TEST_FRACTION * 2**64


@cache
def _pool_questions(name: str) -> list[list[Operands]]:
    buckets: list[list[Operands]] = [[] for _ in range(BUCKETS)]
    for operands in FAMILIES[name].operands:
        if not _is_test(name, operands):
            buckets[_bucket(f"synth_mini {name} {operands}")].append(operands)
    return buckets


def _check_mix(families: Mapping[str, float]) -> None:
    unknown = [name for name in families if name not in FAMILIES]
    if unknown or not families or any(weight < 0 for weight in families.values()) or not sum(families.values()):
        raise DataError(
            f"the mix {dict(families)} has unknown families or weights that are no shares",
            source="--families",
            remedy=f"write name=weight,name=weight with names of {', '.join(FAMILIES)}",
        )


def _check_present(record_path: Path, asked: dict[str, Any]) -> None:
    record = json.loads(record_path.read_bytes())
    different = [key for key, value in asked.items() if record.get(key) != value]
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
        prog="python -m vpmoe.data_curation.synth_mini", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--families", default=DEFAULT_MIX, help=f"name=weight,...; default {DEFAULT_MIX}")
    parser.add_argument("--overwrite", action="store_true")
    options = parser.parse_args(argv)
    try:
        families = parse_mix(options.families)
        made = generate(
            options.output_dir, rows=options.rows, seed=options.seed, families=families, overwrite=options.overwrite
        )
    except VpmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(report(options.output_dir, options.rows, made))
    return 0


if __name__ == "__main__":
    sys.exit(main())
