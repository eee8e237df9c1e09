"""Rows come in one order from parquet and JSONL, and a source that is none says so."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from vpmoe.data_curation.rows import hub as hub_rows
from vpmoe.data_curation.rows.synth import READ_COLUMNS, resolve
from vpmoe.errors import DataError

ROWS = [
    {"synth_id": f"id{n}", "language": "en", "query": f"q{n}", "synthetic_reasoning": "r", "synthetic_answer": "a"}
    for n in range(5)
]


def write_parquet(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_parquet_and_jsonl_give_the_same_rows(tmp_path: Path) -> None:
    parquet, jsonl = tmp_path / "parquet", tmp_path / "jsonl"
    parquet.mkdir()
    jsonl.mkdir()
    write_parquet(parquet / "b.parquet", ROWS[3:])
    write_parquet(parquet / "a.parquet", ROWS[:3])
    (jsonl / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    for folder in (parquet, jsonl):
        source = resolve(str(folder))
        assert [{name: row[name] for name in READ_COLUMNS} for _, row in source.rows()] == ROWS
        assert source.as_manifest()["name"] == folder.name
    places = [place for place, _ in resolve(str(parquet)).rows()]
    assert places == ["a.parquet:0", "a.parquet:1", "a.parquet:2", "b.parquet:0", "b.parquet:1"]
    assert resolve(str(parquet)).total_rows() == 5 and resolve(str(jsonl)).total_rows() is None
    assert str(tmp_path) not in json.dumps(resolve(str(parquet)).as_manifest())


def test_a_row_that_is_not_utf8_comes_as_bytes_and_harms_no_other(tmp_path: Path) -> None:
    raw = pa.array([b"q0", b"q\xff1"], pa.binary())
    unchecked = pa.Array.from_buffers(pa.string(), len(raw), raw.buffers())
    table = pa.table({"synth_id": pa.array(["id0", "id1"]), "query": unchecked})
    for name in ("synthetic_reasoning", "synthetic_answer"):
        table = table.append_column(name, pa.array(["x", "x"]))
    pq.write_table(table, tmp_path / "rows.parquet")
    assert [row["query"] for _, row in resolve(str(tmp_path)).rows()] == ["q0", b"q\xff1"]


@pytest.mark.parametrize("spelled", ["no/such/folder", "missing.parquet", "./missing", "name"])
def test_an_input_that_is_nothing_is_refused(spelled: str) -> None:
    with pytest.raises(DataError, match="hub id"):
        resolve(spelled)


def test_a_hub_id_needs_a_revision(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="--revision"):
        resolve("PleIAs/SYNTH")
    source = resolve("PleIAs/SYNTH", "abc123")
    assert (source.hub_id, source.revision, source.files) == ("PleIAs/SYNTH", "abc123", ())


def test_an_unreachable_hub_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(hub_rows, "RETRY_SECONDS", (0, 0))
    with pytest.raises(DataError, match="no route to host") as caught:
        list(resolve("PleIAs/SYNTH", "abc123").rows())
    assert "check network" in str(caught.value)


def test_missing_columns_and_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="neither"):
        resolve(str(tmp_path))
    write_parquet(tmp_path / "a.parquet", [{"synth_id": "x", "query": "q"}])
    with pytest.raises(DataError, match="synthetic_reasoning, synthetic_answer"):
        list(resolve(str(tmp_path)).rows())
    (tmp_path / "a.parquet").write_bytes(b"PAR1 no")
    with pytest.raises(DataError, match=r"a\.parquet"):
        list(resolve(str(tmp_path)).rows())
    for content in ("{", "[]\n"):
        (tmp_path / "rows.jsonl").write_text(content)
        with pytest.raises(DataError, match=r"rows\.jsonl:1"):
            list(resolve(str(tmp_path / "rows.jsonl")).rows())
