"""The commands `vpmoe data ...` show and check what was built."""

from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from megatron_vpmoe.token_files import read_triple
from vpmoe.cli import main
from vpmoe.data_curation.app import app
from vpmoe.data_curation.look.inspect import SPAN_STYLES, STYLES, inspect
from vpmoe.data_curation.look.text import runs
from vpmoe.errors import DataError
from vpmoe.harmony.parse import Parser
from vpmoe.tokenizer import load_tokenizer


def test_help_lists_the_commands() -> None:
    shown = CliRunner().invoke(app, ["--help"]).output
    for command in ("verify", "inspect", "synth-mini", "stories", "story-prompts"):
        assert command in shown


def test_verify_reports_a_sound_dataset_and_raises_for_another(dataset_dir: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["verify", str(dataset_dir)])
    assert result.exit_code == 0 and "sound" in result.output
    result = CliRunner().invoke(app, ["verify", str(tmp_path)])
    assert isinstance(result.exception, DataError) and result.exception.exit_code == 2
    result = CliRunner().invoke(app, ["verify", str(dataset_dir), "--parsed-per-shard", "-3"])
    assert result.exit_code == 2 and "--parsed-per-shard" in result.output


def test_inspect_shows_figures_and_conversations(dataset_dir: Path) -> None:
    console = Console(record=True, width=120)
    inspect(dataset_dir, console, split="valid", count=2, start=1)
    shown = console.export_text()
    assert "valid 1:" in shown and "valid 2:" in shown and "valid 3:" not in shown
    assert shown.count("<|return|>") == 2 and "tokens a document, valid" in shown


def test_inspect_goes_over_shard_borders(dataset_dir: Path) -> None:
    console = Console(record=True, width=120)
    inspect(dataset_dir, console, count=10_000)
    assert console.export_text().count("<|return|>") == sum(
        read_triple(dataset_dir / "train", f"shard_{shard:02d}").documents for shard in range(5)
    )


def test_colours_are_the_spans(dataset_dir: Path) -> None:
    tokenizer, triple = load_tokenizer(dataset_dir), read_triple(dataset_dir / "train", "shard_00")
    end = triple.place(0).stop
    shown = [(STYLES[kind], run) for kind, run in runs(tokenizer, triple.tokens[:end], triple.span[:end])]
    user, analysis, final = Parser(tokenizer).messages(triple.tokens[: end - 1])[-3:]
    for message, style in zip((user, analysis, final), SPAN_STYLES, strict=True):
        assert any(message.content in run for own, run in shown if own == style)


@pytest.mark.parametrize(("split", "start"), [("test", 0), ("valid", 10_000)])
def test_what_is_not_there_is_not_shown(dataset_dir: Path, split: str, start: int) -> None:
    with pytest.raises(DataError, match=f"{split}|{start}"):
        inspect(dataset_dir, Console(record=True), split=split, start=start)


def test_synth_mini_command(tmp_path: Path) -> None:
    command = ["synth-mini", "--output-dir", str(tmp_path), "--rows", "50", "--families", "sorting=1"]
    assert "50 rows" in CliRunner().invoke(app, command).output
    assert "done and valid" in CliRunner().invoke(app, command).output


def test_a_place_that_cannot_be_written_is_one_message(
    dataset_dir: Path, conversations_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_bytes(b"")
    below = tmp_path / "file" / "below"
    for words in (
        ["inspect", str(dataset_dir), "--html", str(below)],
        ["build", "--input-dir", str(conversations_dir), "--output-dir", str(below)],
        ["convert", "--input", str(dataset_dir / "rejects.jsonl"), "--output-dir", str(below / "further")],
        ["compact-map", "--input", str(dataset_dir / "rejects.jsonl"), "--output-dir", str(below), "--size", "300"],
    ):
        assert main(["data", *words]) == 2
        told = capsys.readouterr().err
        assert str(tmp_path / "file") in told and "remedy:" in told and "Traceback" not in told
