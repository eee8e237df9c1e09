"""A conversation through a pipe: what is kept from turn to turn, what is said, and what ends an answer."""

from __future__ import annotations

import io
import signal
import sys
from pathlib import Path

import openai_harmony
import pytest
import transformers

from tests.tiny_qwen3 import write_qwen3
from vpmoe.cli import main
from vpmoe.errors import HarmonyError
from vpmoe.eval.asking import AsConversation
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.official import as_official, load_encoding
from vpmoe.harmony.prompts import Prompts, with_reasoning_effort
from vpmoe.hf.convert import export_checkpoint
from vpmoe.tokenizer.bpe import save_bpe, train_bpe
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

VALID = ["--only-valid", "--max-new-tokens", "24", "--temperature", "1"]


@pytest.fixture
def talk(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Exit code, stdout and stderr of a session with these lines."""

    def run(where: Path, typed: bytes, *words: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(typed), encoding="utf-8"))
        code = main(["chat", str(where), *words])
        told = capsys.readouterr()
        return code, told.out, told.err

    return run


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every prompt that the engine is given, as text."""
    prompts: list[str] = []
    given = AsConversation.prompt

    def noted(form: AsConversation, *words) -> list[int]:
        ids = given(form, *words)
        prompts.append(form.tokenizer.decode(ids))
        return ids

    monkeypatch.setattr(AsConversation, "prompt", noted)
    return prompts


@pytest.mark.slow
def test_turns_are_kept_without_their_analysis_as_the_exports_template_writes_them(
    run_directory: Path, tmp_path: Path, talk, asked: list[str]
) -> None:
    hf = export_checkpoint(run_directory, tmp_path / "hf").path
    typed = b"What is 1 + 2?\n\nAnd 3?\n/what\n/reset\nAgain\n/quit\nnever read\n"
    code, out, err = talk(run_directory, typed, *VALID, "--reasoning", "high")
    assert code == 0 and out.count("analysis: ") == out.count("final: ") == len(asked) == 3
    assert "no command /what" in err and "a new conversation" in err
    first, second, third = asked
    answer = second.split("<|channel|>final<|message|>")[1].split("<|end|>")[0]
    assert answer and "analysis<|message|>" not in second and "What is 1" not in third
    template = transformers.AutoTokenizer.from_pretrained(hf, trust_remote_code=True).apply_chat_template
    chat = [{"role": "user", "content": "What is 1 + 2?"}]
    said = [*chat, {"role": "assistant", "content": answer}, {"role": "user", "content": "And 3?"}]
    wanted = {"reasoning_effort": "high", "add_generation_prompt": True, "tokenize": False}
    assert [first, second] == [template(chat, **wanted), template(said, **wanted)]
    # The same model from another folder, and to the end of the pipe: the same words.
    assert talk(hf, typed.split(b"/quit")[0], *VALID, "--reasoning", "high")[:2] == (0, out)


def test_openai_harmony_drops_the_same_analysis() -> None:
    tokenizer = load_o200k_harmony()
    turn = [Message("user", "1 + 2?"), Message("assistant", "3", "analysis"), Message("assistant", "It is 3.", "final")]
    whole = as_official([*turn, Message("user", "And 3?")])
    official = load_encoding().render_conversation_for_completion(whole, openai_harmony.Role.ASSISTANT)
    assert AsConversation(tokenizer).prompt("And 3?", [turn[0], turn[2]]) == official


@pytest.mark.slow
def test_what_cannot_be_asked_is_told_and_nothing_is_dropped(run_directory: Path, talk, asked: list[str]) -> None:
    typed = b"Hi\nSay more\n\xff\na\0b\n" + b"long " * 200 + b"\nHi\n"
    code, out, err = talk(run_directory, typed, *VALID, "--context", "150")
    assert "lone surrogate" in err and "NUL" in err
    assert code == 0 and len(asked) == 4 and "context of 150 tokens is full" in err and "Nothing was dropped" in err
    assert asked[3].startswith(asked[1].removesuffix("<|start|>assistant"))
    assert 1 <= out.count("final: ") <= 3
    err = talk(run_directory, b"Hi\n", "--max-new-tokens", "5", "--temperature", "99")[2]
    assert "cut after 5 tokens by --max-new-tokens" in err and "it wrote, outside of any message: " in err


class _Interrupting(io.StringIO):
    """Presses Ctrl-C once, in the middle of the first final message."""

    def write(self, text: str) -> int:
        pressed = "final: " in self.getvalue() and text.strip() and not hasattr(self, "pressed")
        written = super().write(text)
        if pressed:
            self.pressed = True
            signal.raise_signal(signal.SIGINT)
        return written


@pytest.mark.slow
def test_ctrl_c_ends_the_answer_and_not_the_session(run_directory: Path, talk, asked: list[str], monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdout", shown := _Interrupting())
    before = signal.getsignal(signal.SIGINT)
    code, _, err = talk(run_directory, b"Hi\nGo on\n", *VALID[:1], "--max-new-tokens", "60")
    assert code == 0 and err.count("interrupted") == 1 and signal.getsignal(signal.SIGINT) is before
    kept = asked[1].split("<|channel|>final<|message|>")[1].split("<|end|>")[0]
    assert kept and shown.getvalue().split("final: ")[1].startswith(kept) and shown.getvalue().count("final: ") == 2


@pytest.mark.slow
def test_what_cannot_chat_is_refused(run_directory: Path, tmp_path: Path, talk) -> None:
    write_qwen3(tmp_path / "qwen", vocab_size=300)
    save_bpe(train_bpe(["Question: What is 1 + 2?\nAnswer: 3\n"] * 3, 290), tmp_path / "qwen")
    code, out, err = talk(tmp_path / "qwen", b"Hi\n")
    assert code == 2 and not out and "vocabulary of qwen has no Harmony tokens" in err
    for words, told in {
        ("--system", "", "--reasoning", "low"): "no effort to change",
        ("--top-p", "0"): "top_p",
    }.items():
        code, out, err = talk(run_directory, b"Hi\n", *words)
        assert code == 2 and not out and told in err


def test_another_effort_changes_one_line() -> None:
    messages = Prompts(reasoning_effort="low").messages()
    assert with_reasoning_effort(messages, "high") == Prompts(reasoning_effort="high").messages()
    with pytest.raises(HarmonyError, match="no system message"):
        with_reasoning_effort(messages[1:], "high")
