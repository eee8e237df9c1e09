"""Prompts for rollouts are what a model is asked, and the trainer reads what is written."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import read_manifest
from megatron_vpmoe.sources.prompts import read_prompts
from vpmoe.cli import main
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.tokenizer.from_dataset import load_tokenizer


@pytest.mark.slow
def test_what_is_written_is_read_and_only_in_its_vocabulary(
    dataset_dir: Path, rows_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, manifest = tmp_path / "prompts.jsonl", read_manifest(dataset_dir)
    arguments = ["data", "prompts", "--dataset", str(dataset_dir), "--output", str(output), "--input"]
    questions = rows_dir / "test.jsonl"
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    assert main([*arguments, str(questions)]) == main([*arguments, str(questions)]) == 0
    assert f"{len(rows):,} prompts" in capsys.readouterr().out
    asked = read_prompts(output, manifest.tokenizer, 160)
    assert [one.row for one in asked] == rows and manifest.prompts is not None and manifest.prompts.system
    messages = [Message("system", manifest.prompts.system), Message("user", rows[3]["query"])]
    expected = FastRenderer(load_tokenizer(dataset_dir)).generation_prompt(messages)
    assert list(asked[3].ids) == expected.tolist()
    assert asked.heads.keys() == {"low", "medium", "high"} and asked[3].mode == "medium"
    in_high = [replace(messages[0], content=messages[0].content.replace("Reasoning: medium", "Reasoning: high"))]
    wanted = FastRenderer(load_tokenizer(dataset_dir)).generation_prompt([*in_high, messages[1]])
    assert list(asked.in_mode(asked[3], "high").ids) == wanted.tolist() != expected.tolist()
    other = manifest.tokenizer.model_copy(update={"rank_file_sha256": "0"})
    with pytest.raises(DataError, match="prompts in the vocabulary"):
        read_prompts(output, other, 160)

    (tmp_path / "rows.jsonl").write_text('{"question": "1 + 1?"}\n')
    assert main([*arguments, str(tmp_path / "rows.jsonl")]) == 2
    assert "query is missing" in (told := capsys.readouterr().err) and "rows.jsonl:1" in told
    assert main([*arguments, str(tmp_path / "rows.jsonl"), "--field", "question"]) == 0
    output.write_text("a user's\n")
    assert main([*arguments, str(questions)]) == 2 and output.read_text() == "a user's\n"
