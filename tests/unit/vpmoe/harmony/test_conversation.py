"""What makes a conversation fit for training, and how each fault is named."""

import itertools

import pytest
from harmony_strategies import conversations
from hypothesis import given

from vpmoe.errors import RowError
from vpmoe.harmony.conversation import Message, check_conversation
from vpmoe.harmony.prompts import Prompts

SYSTEM, DEVELOPER, USER = Message("system", "s"), Message("developer", "d"), Message("user", "u")
ANALYSIS, FINAL = Message("assistant", "a", "analysis"), Message("assistant", "f", "final")


@given(messages=conversations())
def test_every_wellformed_conversation_passes(messages: tuple[Message, ...]) -> None:
    check_conversation(messages)


def test_exactly_the_orders_of_the_format_pass() -> None:
    passed = []
    for count in range(6):
        for chosen in itertools.permutations((SYSTEM, DEVELOPER, USER, ANALYSIS, FINAL), count):
            try:
                check_conversation(chosen)
            except RowError as error:
                assert error.reason == "role_order"
            else:
                passed.append(chosen)
    tail = (USER, ANALYSIS, FINAL)
    assert sorted(map(len, passed)) == [3, 4, 4, 5]
    assert set(passed) == {tail, (SYSTEM, *tail), (DEVELOPER, *tail), (SYSTEM, DEVELOPER, *tail)}


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (Message("wizard", "u"), "unknown_role"),
        (Message("user", "u", "final"), "unknown_channel"),
        (Message("assistant", "u", "commentary"), "unknown_channel"),
        (Message("assistant", "u"), "unknown_channel"),
        (Message("user", ""), "empty_field"),
        (Message("user", " \n\t"), "empty_field"),
        (Message("user", "a\0b"), "nul"),
        (Message("user", "a\ud800b"), "invalid_utf8"),
        (Message("user", None), "missing_field"),  # pyright: ignore[reportArgumentType]
        (Message("user", 7), "missing_field"),  # pyright: ignore[reportArgumentType]
    ],
)
def test_each_fault_has_its_reason(message: Message, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        check_conversation((message, ANALYSIS, FINAL))
    assert caught.value.reason == reason


def test_prompts_leave_out_what_is_empty() -> None:
    bare = Prompts(None, None, None, "low", (), None)
    assert bare.messages() == (Message("system", "Reasoning: low"),)
    full = Prompts("I", "2024-06", "2025-01-01", "high", ("analysis", "final"), "Do.")
    assert full.messages() == (
        Message(
            "system",
            "I\nKnowledge cutoff: 2024-06\nCurrent date: 2025-01-01\n\nReasoning: high\n\n"
            "# Valid channels: analysis, final. Channel must be included for every message.",
        ),
        Message("developer", "# Instructions\n\nDo."),
    )
    assert full.as_manifest()["developer"] == full.messages()[1].content
