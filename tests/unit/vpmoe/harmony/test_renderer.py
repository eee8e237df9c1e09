"""What the renderer writes: structure by special ids alone, contents as ordinary text, prompts to sample after."""

import numpy as np
import pytest
from harmony_strategies import conversations
from hypothesis import HealthCheck, given, settings

from vpmoe.errors import HarmonyError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.renderer import FastRenderer, make_renderer
from vpmoe.tokenizer.interface import Tokenizer

SHARED = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
EXAMPLE = (
    Message("system", "Reasoning: low"),
    Message("user", "2 + 2?"),
    Message("assistant", "2+2=4", "analysis"),
    Message("assistant", "4", "final"),
)


def test_spelling_of_a_whole_conversation(tokenizer: Tokenizer) -> None:
    ids = FastRenderer(tokenizer).render(EXAMPLE).tokens()
    assert ids.dtype == np.int32
    assert tokenizer.decode(ids) == (
        "<|start|>system<|message|>Reasoning: low<|end|>"
        "<|start|>user<|message|>2 + 2?<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|>2+2=4<|end|>"
        "<|start|>assistant<|channel|>final<|message|>4<|return|>"
    )


@SHARED
@given(messages=conversations())
def test_special_ids_are_the_structure_and_nothing_else(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> None:
    rendered = FastRenderer(tokenizer).render(messages)
    assert len(rendered) == len(rendered.tokens())
    for message, pieces in zip(messages, rendered.messages, strict=True):
        assert not any(tokenizer.is_special(int(token)) for token in pieces.content)
        assert tokenizer.decode(pieces.content) == message.content
        ending = "<|return|>" if message is messages[-1] else "<|end|>"
        assert tokenizer.decode(pieces.terminator) == ending


@SHARED
@given(messages=conversations())
def test_a_prompt_and_its_completion_are_the_conversation(tokenizer: Tokenizer, messages: tuple[Message, ...]) -> None:
    renderer = FastRenderer(tokenizer)
    prompt = renderer.generation_prompt(messages[:-2])
    whole = renderer.render(messages).tokens()
    assert np.array_equal(whole[: len(prompt)], prompt)


def test_only_a_last_final_message_returns(full: Tokenizer) -> None:
    renderer = FastRenderer(full)
    twice = renderer.render([*EXAMPLE, *EXAMPLE[1:]])
    assert [full.decode(piece.terminator) for piece in twice.messages].count("<|return|>") == 1
    assert full.decode(renderer.render(EXAMPLE[:3]).messages[-1].terminator) == "<|end|>"


@pytest.mark.parametrize("messages", [(), EXAMPLE])
def test_a_prompt_ends_with_the_user(full: Tokenizer, messages: tuple[Message, ...]) -> None:
    with pytest.raises(HarmonyError, match="ends with the user's message"):
        FastRenderer(full).generation_prompt(messages)


def test_an_unknown_renderer_is_refused(full: Tokenizer) -> None:
    with pytest.raises(HarmonyError, match="'quick'"):
        make_renderer("quick", full)
