"""The command line: quick help, one message and exit code 2 for a user's error, tracebacks on request only."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vpmoe.config import load_config, parameter_count
from vpmoe.cli import VERBS, main

HEAVY = ("torch", "numpy", "pyarrow", "megatron.core", "matplotlib", "tiktoken", "pydantic")

FAULTS = {
    "missing run": (["eval", "nano", "runs/nowhere", "--questions", "q.jsonl"], "runs/nowhere"),
    "missing run to sample": (["sample", "runs/nowhere", "Why?"], "runs/nowhere"),
    "two forms to ask in": (["sample", "runs/nowhere", "Why?", "--plain", "--passage"], "--plain and --passage"),
    "missing dataset": (["data", "verify", "nowhere"], "nowhere"),
    "missing config": (["model", "param-count", "nowhere.yaml"], "nowhere.yaml"),
    "missing config to describe": (["model", "describe", "nowhere.yaml"], "nowhere.yaml"),
    "unknown step": (["quickstart", "--force", "everything"], "everything"),
    "missing settings": (["quickstart", "--settings", "nowhere.toml"], "nowhere.toml"),
    "missing rank file": (["tokenizer", "install", "--tokenizer-model", "nowhere.tiktoken"], "nowhere.tiktoken"),
}


def test_help_loads_nothing_heavy() -> None:
    code = f"import sys; from vpmoe.cli import main; main(['--help']); print([m for m in {HEAVY} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.rstrip().endswith("[]"), done.stdout[-200:]


@pytest.mark.parametrize(
    "verb", [[], *([name] for name in VERBS if name not in ("train", "profile")), ["eval", "nano"], ["data", "verify"]]
)
def test_every_verb_has_help(verb: list[str], capsys) -> None:
    assert main([*verb, "--help"]) == 0
    assert "Usage" in capsys.readouterr().out


@pytest.mark.parametrize(("verb", "told"), [("train", "--num-layers"), ("profile", "PROFILE_TOOL")])
def test_the_trainers_own_help(verb: str, told: str, capsys) -> None:
    assert main([verb, "--help"]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: vpmoe {verb} ") and told in shown


def test_the_trainer_gets_its_words_as_they_are(capsys) -> None:
    """Flags that click does not know, and --debug, which the front end takes off the line."""
    words = ["train", "configs/nano/stage1.yaml", "--num-layer", "4", "--hidden-size=wide"]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert "unknown flag --num-layer; nearest: --num-layers" in shown and "wide" in shown and "Traceback" not in shown
    assert main([*words, "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_the_nearest_verb_is_named(capsys) -> None:
    assert main(["trian"]) == 2
    assert "'train'" in capsys.readouterr().err


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_one_message_and_exit_code_2(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words, named = FAULTS[name]
    assert main(words) == 2
    shown = capsys.readouterr().err
    assert named in shown and "remedy" in shown and "Traceback" not in shown


def test_empty_run_directory(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    Path("q.jsonl").write_text('{"query": "a", "exercise": "addition", "synthetic_answer": "1"}\n')
    assert main(["eval", "nano", "run", "--questions", "q.jsonl"]) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize("place", [0, 2, 3])
def test_debug_shows_the_traceback_wherever_it_stands(place: int, tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    words = ["eval", "nano", "runs/nowhere"]
    words.insert(place, "--debug")
    assert main(words) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_bug_is_not_dressed_as_a_user_error(monkeypatch) -> None:
    def broken(*_, **__) -> None:
        raise RuntimeError("a bug")

    monkeypatch.setattr("vpmoe.tokenizer.rank_file.install", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        main(["tokenizer", "install"])


@pytest.mark.parametrize(
    "words", [["nonsense"], ["eval", "nano", "--nonsense"], ["sample", "run"], ["quickstart", "--seed", "x"]]
)
def test_wrong_usage_is_exit_code_2(words: list[str], capsys) -> None:
    assert main(words) == 2
    assert "Usage" in capsys.readouterr().err


def test_a_path_that_is_not_utf8_is_one_message(tmp_path: Path, capsys) -> None:
    name = str(tmp_path / b"\xff".decode(errors="surrogateescape"))
    assert main(["data", "question-texts", "--input-dir", str(tmp_path), "--output-dir", name]) == 2
    assert "not UTF-8" in capsys.readouterr().err


def test_param_count_prints_the_geometry(repository: Path, capsys) -> None:
    config = repository / "configs" / "nano" / "stage1.yaml"
    assert main(["model", "param-count", str(config), "--num-layers", "4"]) == 0
    count = parameter_count(load_config(config, ["--num-layers", "4"]))
    printed = {line[:30].strip(): line[30:46].strip() for line in capsys.readouterr().out.splitlines()[1:]}
    expected = {**count.parts, "total": count.total, "active": count.active}
    expected["active without embeddings"] = count.active_without_embeddings
    assert printed == {name: f"{value:,}" for name, value in expected.items()}


def test_tokenizer_install(tmp_path: Path, capsys) -> None:
    assert main(["tokenizer", "install", "--output-dir", str(tmp_path)]) == 0
    assert (tmp_path / "o200k_base.tiktoken").stat().st_size > 3_000_000
    assert "checked" in capsys.readouterr().out


PRINTS_UNFLUSHED = "import sys; from vpmoe import cli; cli.app = lambda **_: print('a line'); sys.exit(cli.main([]))"


@pytest.mark.parametrize("words", [["-m", "vpmoe.cli", "--help"], ["-c", PRINTS_UNFLUSHED]], ids=["at once", "at exit"])
def test_reader_that_leaves_early(words: list[str]) -> None:
    """``vpmoe ... | head``: no traceback, whether the pipe breaks while printing or when the rest is flushed."""
    read, write = os.pipe()
    os.close(read)
    buffered = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    command = [sys.executable, *words]
    done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, check=False, env=buffered)
    os.close(write)
    assert done.stderr == ""


@pytest.mark.parametrize("words", ["quickstart --work-dir LOOP", "data synth-mini --output-dir LOOP"])
def test_a_link_to_itself_is_no_place(words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert main(words.replace("LOOP", str(loop)).split()) == 2
    error = capsys.readouterr().err
    assert str(loop) in error and "remedy:" in error
