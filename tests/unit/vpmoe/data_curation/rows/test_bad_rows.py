"""Bad rows are rejects of every command alike, whatever they are made of."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from vpmoe.cli import main

ROW = {"synth_id": "i", "query": "q", "synthetic_reasoning": "r", "synthetic_answer": "a"}
ROW |= {"text": "t", "prompt": "p", "completion": "c", "chosen": "yes", "rejected": "no"}
FIELDS = {
    "convert": ("synth_id", "query", "synthetic_reasoning", "synthetic_answer"),
    "build-text": ("text",),
    "build-chat": ("prompt", "completion"),
    "build-pairs": ("prompt", "chosen", "rejected"),
}


@pytest.mark.parametrize("verb", FIELDS)
def test_a_blank_line_is_skipped_and_a_bad_one_is_a_reject(
    tmp_path: Path, verb: str, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{name: ROW[name] + str(n) for name in FIELDS[verb]} for n in range(300)]
    lines = [json.dumps(row).encode() for row in rows]
    (tmp_path / "rows.jsonl").write_bytes(b"\n".join([*lines, b"", b'{"a": "\xff"}', b"no", b"[1]", b"  "]))
    command = ["data", verb, "--input", str(tmp_path / "rows.jsonl"), "--output-dir", str(tmp_path / "out"), "--quiet"]
    if verb != "convert":
        command += ["--valid-fraction", "0"]
    assert main([*command, "--max-reject-fraction", "0.009"]) == 2
    assert "3 of 303 rows were rejected" in capsys.readouterr().err
    assert main([*command, "--max-reject-fraction", "0.01"]) == 0
    rejects = json.loads((tmp_path / "out" / "manifest.json").read_text())["rejects"]
    assert (rejects["count"], rejects["reasons"]) == (3, {"invalid_utf8": 1, "not_an_object": 1, "not_json": 1})
    listed = [json.loads(line) for line in (tmp_path / "out" / "rejects.jsonl").read_text().splitlines()]
    assert [entry["row"] for entry in listed] == [f"rows.jsonl:{number}" for number in (302, 303, 304)]
    assert all(entry["detail"] and entry["excerpt"] for entry in listed)
