"""Conversion keeps every valid row, names every other, loses nothing of a user's, and goes on where it was stopped."""

from __future__ import annotations

import json
import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from vpmoe.cli import main
from vpmoe.data_curation.conversations import parts, store
from vpmoe.data_curation.conversations.convert import convert
from vpmoe.data_curation.conversations.manifest import check_or_write_manifest
from vpmoe.data_curation.conversations.store import open_shard, read_row_group
from vpmoe.data_curation.conversations.synth import resolve_synth
from vpmoe.data_curation.harmony import synth_to_harmony, write_synth_harmony_manifest
from vpmoe.data_curation.reject_limit import RejectLimit
from vpmoe.errors import DataError, NotOursError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.prompts import Prompts

NO_LIMIT = RejectLimit(None)


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


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_rows_become_conversations_round_robin(tmp_path: Path) -> None:
    source = resolve_synth(str(write(tmp_path / "rows.jsonl", [row(n) for n in range(5)])))
    prompts = Prompts("I am.", None, None, "low", (), "Do.")
    manifest = convert(source, tmp_path / "out", num_shards=2, prompts=prompts)
    assert (manifest["rows"], manifest["rejects"]["count"]) == (5, 0)
    kept = stored(tmp_path / "out")
    assert [entry.synth_id for entry in kept] == ["id0", "id2", "id4", "id1", "id3"]
    assert kept[0].messages == (
        Message("system", "I am.\n\nReasoning: low"),
        Message("developer", "# Instructions\n\nDo."),
        Message("user", "q0"),
        Message("assistant", "r0 漢", "analysis"),
        Message("assistant", "a0", "final"),
    )
    assert [shard["rows"] for shard in manifest["shards"]] == [3, 2]
    assert manifest["prompts"]["system"] == kept[0].messages[0].content
    assert str(tmp_path) not in json.dumps(manifest)
    assert check_or_write_manifest(tmp_path / "out") == manifest
    names = {"manifest.json", "receipt.json", "rejects.jsonl", "shard_00.parquet", "shard_01.parquet"}
    assert set(contents(tmp_path / "out")) == names


def test_every_invalid_row_is_named_with_its_reason(tmp_path: Path) -> None:
    bad = {
        "missing_field": row(1, query=None),
        "empty_field": row(2, synthetic_answer="  "),
        "nul": row(3, synthetic_reasoning="a\0b"),
        "invalid_utf8": row(4, query="\ud800"),
    }
    source = resolve_synth(str(write(tmp_path / "rows.jsonl", [row(0), *bad.values()])))
    manifest = convert(source, tmp_path / "out", num_shards=1, prompts=Prompts(), limit=NO_LIMIT)
    assert manifest["rows"] == 1 and manifest["rejects"]["reasons"] == dict.fromkeys(bad, 1)
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().split("\n") if line]
    assert [(entry["synth_id"], entry["reason"]) for entry in listed] == [
        (changed["synth_id"], reason) for reason, changed in bad.items()
    ]
    assert listed[0]["row"] == "rows.jsonl:2"


def test_repeated_ids_are_counted_whatever_memory_allows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(store, "ROW_GROUP_ROWS", 8)
    rows = [row(n, synth_id=f"id{min(n % 40, 30)}") for n in range(80)]
    command = ["data", "convert", "--input", str(write(tmp_path / "rows.jsonl", rows)), "--num-shards", "3", "--quiet"]
    for at_once in (1 << 24, 10):
        monkeypatch.setattr(store, "_IDS_AT_ONCE", at_once)
        out = tmp_path / str(at_once)
        assert main([*command, "--output-dir", str(out)]) == 0
        assert "49 have the synth_id of another" in capsys.readouterr().out
        assert json.loads((out / "manifest.json").read_text())["repeated_ids"] == 49


def test_a_refused_conversion_keeps_what_it_did_and_goes_on_with_another_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "ROW_GROUP_ROWS", 4)
    monkeypatch.setattr(parts, "ROW_GROUPS_PER_PART", 2)
    rows = [row(n, **({"query": ""} if n in (3, 37) else {})) for n in range(50)]
    source = resolve_synth(str(write(tmp_path / "rows.jsonl", rows)))
    whole = convert(source, tmp_path / "whole", num_shards=2, prompts=Prompts(), limit=NO_LIMIT)
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"2 of 50 rows were rejected.*empty_field 2"):
        convert(source, out, num_shards=2, prompts=Prompts(), limit=RejectLimit(0.02))
    assert not out.exists()
    kept = contents(tmp_path / "out.partial")
    assert kept["rejects.jsonl"].count(b"\n") == 2
    assert len([name for name in kept if name.startswith("scratch/shard_00")]) == 4

    monkeypatch.setattr("vpmoe.data_curation.conversations.convert.to_conversation", lambda *_: pytest.fail("again"))
    assert convert(source, out, num_shards=2, prompts=Prompts(), limit=RejectLimit(0.05)) == whole
    with pytest.raises(DataError, match="2 of 50 rows were rejected"):
        convert(source, out, num_shards=2, prompts=Prompts(), limit=RejectLimit(0.02))
    assert not (tmp_path / "out.partial").exists() and out.exists()


@pytest.mark.parametrize(("limit", "safe"), [(3000, 0), (8000, 192), (9000, 256)])
def test_a_full_disk_ends_it_with_path_and_what_is_safe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], limit: int, safe: int
) -> None:
    """A limit of a file's length is noticed as a full disk is; the last part is longer than the one before."""
    monkeypatch.setattr(store, "ROW_GROUP_ROWS", 16)
    monkeypatch.setattr(parts, "ROW_GROUPS_PER_PART", 4)
    rows = [row(n, query="q" + random.Random(n).randbytes(200 * (n >= 192)).hex()) for n in range(256)]
    command = ["data", "convert", "--input", str(write(tmp_path / "rows.jsonl", rows)), "--num-shards", "3", "--quiet"]
    assert main([*command, "--output-dir", str(tmp_path / "whole")]) == 0
    capfd.readouterr()
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        assert main([*command, "--output-dir", str(tmp_path / "out")]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    told = capfd.readouterr().err
    assert f"finished and safe: {safe} rows" in told and f"where:  {tmp_path / 'out.partial'}" in told
    assert "Traceback" not in told and not list(tmp_path.rglob("*part_*.tmp"))
    assert main([*command, "--output-dir", str(tmp_path / "out")]) == 0
    assert contents(tmp_path / "out").keys() == contents(tmp_path / "whole").keys()
    for name, content in contents(tmp_path / "whole").items():
        assert name == "receipt.json" or (tmp_path / "out" / name).read_bytes() == content


def test_the_embedded_source_is_not_wiped(tmp_path: Path) -> None:
    """The output is the input, lies in it, or holds it: refused, and every file is as it was."""
    folder = tmp_path / "data" / "rows"
    assert main(["data", "synth-mini", "--output-dir", str(folder), "--rows", "20"]) == 0
    before = contents(tmp_path)
    for output in (folder, folder / "out", folder.parent):
        for more in ([], ["--overwrite"]):
            assert main(["data", "convert", "--input", str(folder), "--output-dir", str(output), *more]) == 2
            assert contents(tmp_path) == before


@pytest.mark.parametrize("more", [[], ["--overwrite"]])
def test_files_that_it_did_not_make_stay(tmp_path: Path, more: list[str]) -> None:
    rows = str(write(tmp_path / "rows.jsonl", [row(n) for n in range(3)]))
    out = tmp_path / "out"
    out.mkdir()
    for name in ("mine.parquet", "manifest.json", ".notes.tmp"):
        (out / name).write_text("mine")
    before = contents(out)
    assert main(["data", "convert", "--input", rows, "--output-dir", str(out), *more]) == 2
    assert contents(out) == before


def test_a_second_conversion_is_done_and_another_needs_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows, out = str(write(tmp_path / "rows.jsonl", [row(n) for n in range(3)])), tmp_path / "out"
    command = ["--input", rows, "--output-dir", str(out), "--num-shards"]
    assert synth_to_harmony.main([*command, "3"]) == 0
    before = contents(out)
    assert synth_to_harmony.main([*command, "3", "--no-strict", "--quiet"]) == 0
    assert "done and valid" in capsys.readouterr().out and contents(out) == before
    assert main(["data", "convert", *command, "1"]) == 2
    assert "num_shards: 3 -> 1" in capsys.readouterr().err and contents(out) == before
    assert main(["data", "convert", *command, "3", "--reasoning-effort", "low"]) == 2
    assert "prompts.options.reasoning_effort: medium -> low" in capsys.readouterr().err
    assert main(["data", "convert", *command, "1", "--overwrite"]) == 0
    assert set(contents(out)) == {"shard_00.parquet", "manifest.json", "receipt.json", "rejects.jsonl"}


def test_damage_is_made_good_only_when_asked(tmp_path: Path) -> None:
    rows, out = str(write(tmp_path / "rows.jsonl", [row(n) for n in range(3)])), tmp_path / "out"
    command = ["data", "convert", "--input", rows, "--output-dir", str(out), "--num-shards", "2"]
    assert main(command) == 0
    before = contents(out)
    (out / "shard_01.parquet").unlink()
    assert main(command) == 2 and not (out / "shard_01.parquet").exists()
    assert main([*command, "--overwrite"]) == 0
    assert (out / "shard_01.parquet").read_bytes() == before["shard_01.parquet"]


def test_the_manifest_of_shards_is_checked_or_written(tmp_path: Path) -> None:
    rows, out = str(write(tmp_path / "rows.jsonl", [row(n) for n in range(3)])), tmp_path / "out"
    assert main(["data", "convert", "--input", rows, "--output-dir", str(out), "--num-shards", "2"]) == 0
    assert write_synth_harmony_manifest.main(["--dataset-dir", str(out)]) == 0

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for name in ("shard_00.parquet", "shard_01.parquet"):
        (foreign / name).write_bytes((out / name).read_bytes())
    before = contents(foreign)
    assert write_synth_harmony_manifest.main(["--dataset-dir", str(foreign)]) == 0
    assert {**before, "manifest.json": (foreign / "manifest.json").read_bytes()} == contents(foreign)
    manifest, ours = (json.loads((folder / "manifest.json").read_text()) for folder in (foreign, out))
    assert manifest["shards"] == ours["shards"] and manifest["rows"] == 3
    assert manifest["repeated_ids"] == ours["repeated_ids"] == 0
    assert manifest["prompts"]["system"] == ours["prompts"]["system"]

    for folder in (out, foreign):
        (folder / "shard_02.parquet").write_bytes(before["shard_00.parquet"])
        with pytest.raises(DataError, match=r"shard_02\.parquet"):
            check_or_write_manifest(folder)
        (folder / "shard_02.parquet").unlink()
        (folder / "shard_01.parquet").write_bytes(before["shard_00.parquet"])
        with pytest.raises(DataError, match=r"shard_01\.parquet"):
            check_or_write_manifest(folder)
        (folder / "shard_01.parquet").unlink()
        with pytest.raises(DataError, match=r"shard_01\.parquet is missing"):
            check_or_write_manifest(folder)
    with pytest.raises(DataError, match="no conversations"):
        check_or_write_manifest(tmp_path)
    (out / "manifest.json").unlink()
    with pytest.raises(DataError, match="manifest of a finished conversion is gone"):
        check_or_write_manifest(out)


def test_damage_inside_a_shard_is_named_by_file_and_row_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As of shards that another program damaged before their manifest was written."""
    monkeypatch.setattr(store, "ROW_GROUP_ROWS", 8)
    rows = str(write(tmp_path / "rows.jsonl", [row(n, query=f"q{n}" * 100) for n in range(32)]))
    assert main(["data", "convert", "--input", rows, "--output-dir", str(tmp_path / "out"), "--num-shards", "1"]) == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    content = bytearray((tmp_path / "out" / "shard_00.parquet").read_bytes())
    contents_of_messages = open_shard(tmp_path / "out" / "shard_00.parquet").metadata.row_group(2).column(4)
    begin = contents_of_messages.dictionary_page_offset or contents_of_messages.data_page_offset
    content[begin : begin + 50] = b"\xaa" * 50
    (foreign / "shard_00.parquet").write_bytes(content)
    assert write_synth_harmony_manifest.main(["--dataset-dir", str(foreign)]) == 0
    build = ["data", "build", "--input-dir", str(foreign), "--output-dir", str(tmp_path / "built"), "--workers", "1"]
    assert main([*build, "--valid-fraction", "0"]) == 2
    told = capsys.readouterr().err
    assert "row group 2 cannot be read" in told and f"where:  {foreign / 'shard_00.parquet'}" in told


@pytest.mark.parametrize("make", [Path.mkdir, lambda path: path.symlink_to("/nowhere"), Path.touch])
def test_what_is_no_parquet_in_a_folder_of_shards_is_named(
    tmp_path: Path, make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    make(tmp_path / "a.parquet")
    assert write_synth_harmony_manifest.main(["--dataset-dir", str(tmp_path)]) == 2
    assert "not a readable parquet file: " in (told := capsys.readouterr().err) and "a.parquet" in told


def test_the_command_names_the_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert synth_to_harmony.main(["--input", str(tmp_path / "none"), "--output-dir", str(tmp_path / "out")]) == 2
    shown = capsys.readouterr().err
    assert "where:" in shown and "remedy:" in shown and "Traceback" not in shown
    both = ["--omit-developer", "--developer-instructions", "x"]
    assert main(["data", "convert", "--input", "x", "--output-dir", "y", *both]) == 2
    with pytest.raises(NotOursError):
        (tmp_path / "file").touch()
        source = resolve_synth(str(write(tmp_path / "rows.jsonl", [row(0)])))
        convert(source, tmp_path / "file", num_shards=1, prompts=Prompts())
