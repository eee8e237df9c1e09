"""Conversion keeps every valid row, names every other, and its manifest holds it to that."""

import json
from pathlib import Path

import pytest

from vpmoe.data_curation.conversations.store import open_shard, read_row_group
from vpmoe.data_curation.harmony import synth_to_harmony, write_synth_harmony_manifest
from vpmoe.data_curation.harmony.write_synth_harmony_manifest import write_conversations_manifest
from vpmoe.data_curation.rows.synth import resolve
from vpmoe.errors import DataError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.prompts import Prompts


def row(number: int, **changes: object) -> dict:
    texts = {"query": f"q{number}", "synthetic_reasoning": f"r{number} 漢", "synthetic_answer": f"a{number}"}
    return {"synth_id": f"id{number}", "language": None} | texts | changes


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows))
    return path


def stored(folder: Path) -> list:
    shards = [open_shard(path) for path in sorted(folder.glob("*.parquet"))]
    return [
        entry for shard in shards for group in range(shard.num_row_groups) for entry in read_row_group(shard, group)
    ]


def test_rows_become_conversations_round_robin(tmp_path: Path) -> None:
    source = resolve(str(write(tmp_path / "rows.jsonl", [row(n) for n in range(5)])))
    prompts = Prompts("I am.", None, None, "low", (), "Do.")
    done = synth_to_harmony.convert(source, tmp_path / "out", num_shards=2, prompts=prompts)
    assert (done.rows, done.rejected) == (5, 0)
    kept = stored(tmp_path / "out")
    assert [entry.synth_id for entry in kept] == ["id0", "id2", "id4", "id1", "id3"]
    assert kept[0].messages == (
        Message("system", "I am.\n\nReasoning: low"),
        Message("developer", "# Instructions\n\nDo."),
        Message("user", "q0"),
        Message("assistant", "r0 漢", "analysis"),
        Message("assistant", "a0", "final"),
    )
    manifest = write_conversations_manifest(tmp_path / "out")
    assert manifest["rows"] == 5 and [shard["rows"] for shard in manifest["shards"]] == [3, 2]
    assert manifest["prompts"]["system"] == kept[0].messages[0].content
    assert str(tmp_path) not in json.dumps(manifest)


def test_every_invalid_row_is_named_with_its_reason(tmp_path: Path) -> None:
    bad = {
        "missing_field": row(1, query=None),
        "empty_field": row(2, synthetic_answer="  "),
        "nul": row(3, synthetic_reasoning="a\0b"),
        "invalid_utf8": row(4, query="\ud800"),
    }
    source = resolve(str(write(tmp_path / "rows.jsonl", [row(0), *bad.values()])))
    done = synth_to_harmony.convert(source, tmp_path / "out", num_shards=1, prompts=Prompts(), strict=False)
    assert done.rows == 1 and dict(done.rejects) == dict.fromkeys(bad, 1)
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [(entry["synth_id"], entry["reason"]) for entry in listed] == [
        (changed["synth_id"], reason) for reason, changed in bad.items()
    ]
    assert listed[0]["row"] == "rows.jsonl:2"


def test_strict_stops_and_leaves_no_conversations(tmp_path: Path) -> None:
    source = resolve(str(write(tmp_path / "rows.jsonl", [row(0), row(1, query="")])))
    with pytest.raises(DataError, match=r"1 of 2 rows were rejected.*empty_field 1"):
        synth_to_harmony.convert(source, tmp_path / "out", num_shards=1, prompts=Prompts())
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["rejects.jsonl"]
    with pytest.raises(DataError, match="did not finish"):
        write_conversations_manifest(tmp_path / "out")


def test_a_second_conversion_needs_overwrite(tmp_path: Path) -> None:
    rows, out = str(write(tmp_path / "rows.jsonl", [row(n) for n in range(3)])), str(tmp_path / "out")
    assert synth_to_harmony.main(["--input", rows, "--output-dir", out, "--num-shards", "3"]) == 0
    assert write_synth_harmony_manifest.main(["--dataset-dir", out]) == 0
    assert synth_to_harmony.main(["--input", rows, "--output-dir", out]) == 2
    assert synth_to_harmony.main(["--input", rows, "--output-dir", out, "--num-shards", "1", "--overwrite"]) == 0
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"shard_00.parquet", "conversion.json", "rejects.jsonl"}, "a manifest of the former shards is gone"


def test_a_lost_or_added_shard_is_noticed(tmp_path: Path) -> None:
    rows, out = str(write(tmp_path / "rows.jsonl", [row(n) for n in range(3)])), tmp_path / "out"
    assert synth_to_harmony.main(["--input", rows, "--output-dir", str(out), "--num-shards", "2"]) == 0
    (out / "shard_02.parquet").write_bytes((out / "shard_00.parquet").read_bytes())
    with pytest.raises(DataError, match=r"shard_02\.parquet"):
        write_conversations_manifest(out)
    (out / "shard_02.parquet").unlink()
    (out / "shard_01.parquet").write_bytes((out / "shard_00.parquet").read_bytes())
    with pytest.raises(DataError, match="the shards hold 4 rows, the conversion wrote 3"):
        write_conversations_manifest(out)


def test_the_command_names_the_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synth_to_harmony.main(["--input", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert "where:" in shown and "remedy:" in shown and "Traceback" not in shown
