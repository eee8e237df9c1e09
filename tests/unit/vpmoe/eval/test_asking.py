"""Prompts that are the beginning of what a model was trained on, and where its messages come from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from vpmoe.errors import HarmonyError
from vpmoe.eval.asking import AsConversation, AsText, form_of, stop_ids
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.prompts import Prompts
from vpmoe.harmony.renderer import FastRenderer

STORED = Prompts(developer_instructions="Be brief.").messages()


def asked(tokenizer: Any, prompts: Any, **flags: Any) -> tuple[Any, str]:
    """The form, and what was said about it."""
    opened: Any = SimpleNamespace(tokenizer=tokenizer, prompts=prompts, path="runs/x")
    said: list[str] = []
    form = form_of(opened, **{"plain": False, "system": None, "developer": None, "say": said.append, **flags})
    (line,) = said
    return form, line


def test_prompt_is_a_prefix_of_the_trained_conversation(tokenizer) -> None:
    user = Message("user", "What is 7 + 8?")
    replies = (Message("assistant", "15", "analysis"), Message("assistant", "15", "final"))
    trained = FastRenderer(tokenizer).render([*STORED, user, *replies]).tokens().tolist()
    prompt = AsConversation(tokenizer, STORED).prompt(user.content)
    assert trained[: len(prompt)] == prompt
    assert tokenizer.decode(prompt).endswith("<|start|>assistant")
    assert tokenizer.decode(trained[len(prompt) :]).startswith("<|channel|>analysis")


def test_stored_messages_are_used_unless_others_are_given(tokenizer) -> None:
    form, line = asked(tokenizer, STORED)
    assert form.context == STORED and "as stored with runs/x" in line
    form, line = asked(tokenizer, STORED, developer="Be loud.")
    assert form.context == (STORED[0], Message("developer", "Be loud.")) and "developer message given" in line
    form, _ = asked(tokenizer, STORED, system="", developer="")
    assert form.context == ()


def test_a_model_without_stored_messages_is_told_of_and_of_the_flags(tokenizer) -> None:
    form, line = asked(tokenizer, None)
    assert form.context == ()
    for word in ("no system and developer messages are stored", "--system", "--developer", "--plain"):
        assert word in line
    assert asked(tokenizer, None, system="You are.")[0].context == (Message("system", "You are."),)
    # None at all is another thing than messages that the training left out.
    assert "as stored" in asked(tokenizer, ())[1]


def test_plain_text(tokenizer) -> None:
    form, line = asked(tokenizer, STORED, plain=True)
    assert isinstance(form, AsText) and "plain text" in line
    assert tokenizer.decode(form.prompt("What is 7 + 8?")) == "Question: What is 7 + 8?\nAnswer:"
    answer = tokenizer.encode_ordinary(" 15\n").tolist()
    assert (form.judge(answer).final, form.judge(answer).valid) == ("15", True)
    assert (form.judge(answer[:-1]).final, form.judge(answer[:-1]).valid) == ("15", False)
    assert not form.judge([tokenizer.vocab_size]).valid
    with pytest.raises(HarmonyError, match="plain text has no"):
        asked(tokenizer, STORED, plain=True, system="You are.")


def test_what_ends_a_generation(tokenizer) -> None:
    ends = stop_ids(tokenizer)
    assert {tokenizer.decode([token]) for token in ends} == {"<|return|>", "<|call|>", "<|endoftext|>"}
    more = set(stop_ids(tokenizer, at_line_feed=True)) - set(ends)
    assert more and all("\n" in tokenizer.decode([token]) for token in more)
