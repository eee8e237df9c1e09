"""Every format gives the same rows in the same order; what cannot be read is named."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from vpmoe.data_curation.rows import hub as hub_rows
from vpmoe.data_curation.rows.documents import resolve
from vpmoe.errors import DataError

ROWS = [{"id": f"d{i}", "text": f"line {i}\nwith é {i}"} for i in range(20)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()


def test_jsonl_zst_and_parquet_give_the_same_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    half = len(LINES) // 2
    frames = zstandard.compress(LINES[:half]) + zstandard.compress(LINES[half:])
    (tmp_path / "b.jsonl.zst").write_bytes(frames)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "c.parquet")
    for name in ("a.jsonl", "b.jsonl.zst", "c.parquet"):
        source = resolve(str(tmp_path / name))
        assert [dict(row) for _, row in source.rows(("id", "text"))] == ROWS
        assert source.bytes_read == source.total_bytes > 0
    folder = resolve(str(tmp_path))
    assert len(list(folder.rows())) == 60
    assert str(tmp_path) not in json.dumps(folder.as_manifest())


def test_a_text_file_is_a_document(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b.txt").write_text("two")
    (tmp_path / "a.txt").write_bytes(b"\xff\xfe")
    found = list(resolve(str(tmp_path)).rows(("text",)))
    assert found == [("a.txt", {"text": b"\xff\xfe"}), ("sub/b.txt", {"text": "two"})]


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", b'{"text": 1}\nno', "line is not a JSON object"),
        ("a.jsonl", b"[1]\n", "line is not a JSON object"),
        ("a.jsonl.zst", b"not zstd", "cannot be read"),
        ("a.jsonl.zst", zstandard.compress(LINES)[:-9], "cannot be read"),
        ("a.parquet", b"not parquet", "not a readable parquet file"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, name: str, content: bytes, match: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=match):
        list(resolve(str(tmp_path / name)).rows())


def test_sources_that_are_none_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no file"):
        resolve(str(tmp_path))
    with pytest.raises(DataError, match="not a hub id"):
        resolve(str(tmp_path / "nothing.jsonl"))
    with pytest.raises(DataError, match="pinned revision"):
        resolve("owner/name")


def test_the_hub_offline_is_a_typed_error(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def offline(*arguments: object, **options: object) -> None:
        assert options["revision"] == "abc" and options["streaming"]
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    monkeypatch.setattr(hub_rows, "RETRY_SECONDS", (0, 0))
    with pytest.raises(DataError, match="no route to host"):
        list(resolve("owner/name", "abc").rows())


def test_the_hub_is_streamed_with_the_asked_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    stream = datasets.IterableDataset.from_generator(lambda: iter(ROWS))
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **o: stream)
    found = list(resolve("owner/name", "abc").rows(("id", "text")))
    assert found[3] == ("owner/name:3", ROWS[3]) and len(found) == 20
