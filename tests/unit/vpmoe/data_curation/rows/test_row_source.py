"""Every format gives the same rows in the same order, from any row on; what cannot be read is named."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from vpmoe.data_curation.conversations.synth import open_synth, resolve_synth
from vpmoe.data_curation.rows import hub as hub_rows
from vpmoe.data_curation.rows.source import RowSource, resolve
from vpmoe.errors import DataError, RowError

ROWS = [{"id": f"d{i}", "text": f"line {i}\nwith é\u2028{i}"} for i in range(20)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
SYNTH = [
    {"synth_id": f"id{n}", "language": "en", "query": f"q{n}", "synthetic_reasoning": "r", "synthetic_answer": "a"}
    for n in range(5)
]


def write_parquet(path: Path, rows: list[dict]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_every_format_gives_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    half = len(LINES) // 2
    frames = zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:])
    (tmp_path / "b.jsonl.zst").write_bytes(frames)
    write_parquet(tmp_path / "c.parquet", ROWS)
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        source = resolve(str(tmp_path / name))
        assert [dict(row) for _, row in source.rows(("id", "text"))] == ROWS
        assert source.bytes_read == source.total_bytes > 0
    folder = resolve(str(tmp_path))
    assert len(list(folder.rows())) == 60
    assert str(tmp_path) not in json.dumps(folder.as_manifest())


def test_a_stream_goes_on_from_any_row(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", ROWS[:7])
    write_parquet(tmp_path / "b.parquet", ROWS[7:9])
    (tmp_path / "c.jsonl").write_bytes(LINES)
    source = resolve(str(tmp_path))
    whole = list(source.rows())
    for begin in range(len(whole) + 1):
        stream = source.open(cursor={"row": begin})
        assert list(stream) == whole[begin:] and stream.cursor() == {"row": len(whole)}


def test_a_last_line_without_line_feed_counts_and_blank_lines_do_not(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"text": "a"}\n\n  \n{"text": "b\xe2\x80\xa8c"}\r\n{"text": "d"}')
    places = [(place, row["text"]) for place, row in resolve(str(tmp_path / "rows.jsonl")).rows()]
    assert places == [("rows.jsonl:1", "a"), ("rows.jsonl:4", "b\u2028c"), ("rows.jsonl:5", "d")]


def test_a_folder_of_synth_rows_is_read_in_one_format(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in SYNTH))
    assert [row for _, row in resolve_synth(str(tmp_path)).rows()] == SYNTH
    write_parquet(tmp_path / "b.parquet", SYNTH[3:])
    write_parquet(tmp_path / "a.parquet", SYNTH[:3])
    (tmp_path / "more.jsonl").write_text("")
    with pytest.raises(DataError, match=r"parquet and JSONL: a\.parquet, more\.jsonl(.|\n)*only test\.jsonl"):
        resolve_synth(str(tmp_path))
    (tmp_path / "more.jsonl").unlink()
    source = resolve_synth(str(tmp_path))
    assert [place for place, _ in source.rows()] == [
        "a.parquet:0",
        "a.parquet:1",
        "a.parquet:2",
        "b.parquet:0",
        "b.parquet:1",
    ]
    assert source.total_rows() == 5 and resolve_synth(str(tmp_path / "test.jsonl")).total_rows() is None
    assert source.as_manifest()["name"] == tmp_path.name


def test_only_the_columns_that_are_wanted_are_read(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{**SYNTH[0], "exercise": "x"}])
    assert [row for _, row in open_synth(resolve_synth(str(tmp_path)))] == SYNTH[:1]
    without = {name: value for name, value in SYNTH[0].items() if name != "language"}
    write_parquet(tmp_path / "a.parquet", [without])
    assert [row for _, row in open_synth(resolve_synth(str(tmp_path)))] == [without]


def reasons(source: RowSource) -> list[tuple[str, str | None]]:
    return [(place, row.reason if isinstance(row, RowError) else None) for place, row in source.open()]


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_bytes(b"ok \xff\xfe")
    (place, fault), found = resolve(str(tmp_path)).open(("text",))
    assert found == ("sub/b.txt", {"text": "two"})
    assert place == "a.txt" and isinstance(fault, RowError) and fault.what == "byte 3 of the file is not UTF-8"


def test_a_text_file_of_several_texts_is_one_of_each(tmp_path: Path) -> None:
    path = tmp_path / "TinyStories-valid.txt"
    path.write_bytes(
        b"Pip ran.\n\nThe end.\n<|endoftext|>\r\n\n<|endoftext|>\nb\xff\n<|endoftext|>\n a <|endoftext|> b\n"
    )
    source = resolve(str(path))
    first, bad, last = source.open(("text",))
    assert first == (f"{path.name}:1", {"text": "Pip ran.\n\nThe end."}) and last[0] == f"{path.name}:9"
    assert isinstance(bad[1], RowError) and bad[1].what == "byte 50 of the file is not UTF-8"
    assert last[1] == {"text": " a <|endoftext|> b"}  # within a line it is text like any
    assert source.bytes_read == source.total_bytes
    stream = source.open(("text",))
    _ = next(iter(stream))
    assert [place for place, _ in source.open(("text",), stream.cursor())] == [bad[0], last[0]]


@pytest.mark.parametrize("suffix", ["", ".zst"])
def test_a_bad_line_is_named_and_harms_no_other(tmp_path: Path, suffix: str) -> None:
    lines = {
        b'{"text": "a"}': None,
        b"": "left out",
        b"no": "not_json",
        b'{"text": "\xff"}': "invalid_utf8",
        b"[1]": "not_an_object",
        b"[" * 100_000: "too_deep",
        b'{"text": ' + b"[" * 500 + b"]" * 500 + b"}": "too_deep",
        b'{"text": ' + b"[" * 99 + b"]" * 99 + b"}": None,
        b'{"text": "' + b"[" * 500 + b'"}': None,
        b'{"text": 1, "text": 2}': "key_twice",
        b'{"text": ' + b"9" * 5000 + b"}": "not_json",
        b'\xef\xbb\xbf{"text": "b"}\r': None,
        '{"text": "é"}'.encode("utf-16-le"): "invalid_utf8",
        b'{"text": "last"}': None,
    }
    content = b"\n".join(lines)
    (tmp_path / f"a.jsonl{suffix}").write_bytes(zstandard.compress(content) if suffix else content)
    source = resolve(str(tmp_path))
    places = enumerate(lines.values(), start=1)
    assert reasons(source) == [(f"a.jsonl{suffix}:{n}", reason) for n, reason in places if reason != "left out"]
    with pytest.raises(DataError, match=rf"the line is not JSON(.|\n)*a\.jsonl{suffix}:3"):
        list(source.rows())


BYTES = [b"q0", b"q\xff1", None]


@pytest.mark.parametrize(
    "column",
    [
        pa.Array.from_buffers(pa.string(), 3, pa.array(BYTES, pa.binary()).buffers()),
        pa.Array.from_buffers(pa.large_string(), 3, pa.array(BYTES, pa.large_binary()).buffers()),
        pa.array([0, 1 << 62, None], pa.timestamp("us")),
    ],
)
def test_a_value_that_is_no_text_rejects_its_row_alone(tmp_path: Path, column: pa.Array) -> None:
    nested = pa.StructArray.from_arrays([column], ["content"])
    for name, array in (("a", column), ("b", nested)):
        pq.write_table(pa.table({"id": pa.array(["id0", "id1", "id2"]), "query": array}), tmp_path / f"{name}.parquet")
    reason = "unreadable_value" if pa.types.is_timestamp(column.type) else "invalid_utf8"
    found = [(f"{name}.parquet:{row}", reason if row == 1 else None) for name in "ab" for row in range(3)]
    assert reasons(resolve(str(tmp_path))) == found


@pytest.mark.parametrize("kind", [pa.binary(), pa.large_binary(), pa.binary_view(), pa.binary(2)])
def test_bytes_that_are_utf8_are_text(tmp_path: Path, kind: pa.DataType) -> None:
    column = pa.array([b"q0", b"\xc3\xa9", b"\xff1"], kind)
    nested = pa.StructArray.from_arrays([column], ["content"])
    pq.write_table(pa.table({"query": column, "message": nested}), tmp_path / "rows.parquet")
    found = [row for _, row in resolve(str(tmp_path)).rows()]
    assert found == [{"query": text, "message": {"content": text}} for text in ("q0", "é", b"\xff1")]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl.zst", b"not zstd", "cannot be read"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-9], "cannot be read"),
        ("a.parquet", b"not parquet", "not a readable parquet file"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        list(resolve(str(tmp_path / name)).rows())


def test_a_damaged_page_is_named_by_file_and_row_group(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    table = pa.Table.from_pylist([{"text": f"{number:064x}"} for number in range(5000)])
    pq.write_table(table, path, row_group_size=1000)
    content = bytearray(path.read_bytes())
    begin = pq.ParquetFile(path).metadata.row_group(3).column(0).data_page_offset
    content[begin : begin + 5000] = b"\xaa" * 5000
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"row group 3 cannot be read(.|\n)*a\.parquet"):
        list(resolve(str(path)).rows())
    pq.write_table(pa.Table.from_arrays([table["text"]] * 2, names=["text", "text"]), path)
    with pytest.raises(DataError, match=r"columns text are there more than once(.|\n)*a\.parquet"):
        list(resolve(str(path)).rows(("text",)))


def test_what_hides_rows_in_a_folder_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    dataset = folder / "a.parquet"
    dataset.mkdir(parents=True)
    write_parquet(dataset / "part-0.parquet", ROWS[:3])
    assert len(list(resolve(str(folder)).rows())) == 3
    for target in (tmp_path / "nowhere", dataset):
        (folder / "b.parquet").symlink_to(target)
        with pytest.raises(DataError, match=r"rows would be missing(.|\n)*b\.parquet"):
            resolve(str(folder))
        (folder / "b.parquet").unlink()
    (folder / "b.parquet").symlink_to(dataset / "part-0.parquet")
    assert len(list(resolve(str(folder)).rows())) == 6


def test_missing_columns_are_named(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a.parquet", [{"synth_id": "x", "query": "q"}])
    with pytest.raises(DataError, match="synthetic_reasoning, synthetic_answer"):
        list(open_synth(resolve_synth(str(tmp_path))))


@pytest.mark.parametrize("spelled", ["no/such/folder", "missing.parquet", "./missing", "name"])
def test_an_input_that_is_nothing_is_refused(spelled: str) -> None:
    with pytest.raises(DataError, match="not a hub id"):
        resolve(spelled)


def test_a_folder_without_rows_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(DataError, match=r"holds no file(.|\n)*parquet, \*\.jsonl"):
        resolve_synth(str(tmp_path))


COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.mark.parametrize("revision", [None, "main", "v1.0", "abc123", COMMIT.upper(), COMMIT + "\n"])
def test_a_hub_id_needs_a_commit(revision: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=r"needs a commit(.|\n)*--revision"):
        resolve("PleIAs/SYNTH", revision)
    source = resolve("PleIAs/SYNTH", COMMIT)
    assert (source.hub_id, source.revision, source.files) == ("PleIAs/SYNTH", COMMIT, ())
    with pytest.raises(DataError, match="is a local path, which has no revision"):
        resolve(str(tmp_path), revision or COMMIT)


def test_an_unreachable_hub_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: object, **options: object) -> None:
        assert options["revision"] == COMMIT
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset_builder", offline)
    monkeypatch.setattr(hub_rows, "RETRY_SECONDS", (0, 0))
    with pytest.raises(DataError, match="no route to host") as caught:
        list(resolve("owner/name", COMMIT).rows())
    assert "check network" in str(caught.value)


@pytest.mark.parametrize("form", ["parquet", "json"])
def test_columns_that_are_not_needed_are_not_fetched(
    form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file's other column is unreadable, where a format has columns that can be left out."""
    path = tmp_path / f"rows.{form}"
    if form == "json":
        path.write_text("".join(json.dumps({**row, "more": 1}) + "\n" for row in ROWS))
    else:
        table = pa.Table.from_pylist([{**row, "more": f"{row['id']} is heavy"} for row in ROWS])
        pq.write_table(table, path, compression="NONE", use_dictionary=False)
        column = pq.ParquetFile(path).metadata.row_group(0).column(table.schema.names.index("more"))
        torn = bytearray(path.read_bytes())
        torn[column.data_page_offset : column.data_page_offset + 20] = b"\xff" * 20
        path.write_bytes(torn)
    build = datasets.load_dataset_builder
    monkeypatch.setattr(hub_rows, "RETRY_SECONDS", ())
    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *_, revision, **given: build(form, data_files=str(path), **given)
    )
    found = list(resolve("owner/name", COMMIT).rows(("id", "text")))
    assert found[3] == ("owner/name:3", ROWS[3]) and len(found) == 20
    with pytest.raises(DataError, match="columns title are missing; found id, more, text"):
        list(resolve("owner/name", COMMIT).rows(("title",)))
