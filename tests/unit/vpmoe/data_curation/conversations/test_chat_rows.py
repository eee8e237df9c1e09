"""Rows of every accepted form become the messages they say; anything else is refused with its reason."""

import pytest

from vpmoe.data_curation.conversations.chat_rows import Pair, chat_messages, preference_pair
from vpmoe.errors import RowError
from vpmoe.harmony.conversation import Message

USER, FINAL = Message("user", "q"), Message("assistant", "a", "final")
THOUGHT = Message("assistant", "t", "analysis")
Q, A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
T = {"role": "assistant", "content": "t", "channel": "analysis"}


@pytest.mark.parametrize(
    ("row", "messages"),
    [
        ({"messages": [Q, A]}, (USER, FINAL)),
        ({"messages": [Q, {**A, "thinking": "t"}]}, (USER, THOUGHT, FINAL)),
        ({"messages": [Q, T, {**A, "channel": "final"}]}, (USER, THOUGHT, FINAL)),
        ({"messages": [Q, A, Q, T, A]}, (USER, FINAL, USER, THOUGHT, FINAL)),
        (
            {"messages": [{"role": "system", "content": "s"}, {"role": "developer", "content": "d"}, Q, A]},
            (Message("system", "s"), Message("developer", "d"), USER, FINAL),
        ),
        ({"messages": [Q, {**A, "thinking": None, "channel": None, "tool_calls": None}]}, (USER, FINAL)),
        ({"prompt": "q", "completion": "a"}, (USER, FINAL)),
        ({"prompt": [Q], "completion": [A]}, (USER, FINAL)),
        ({"prompt": [Q, A, Q], "completion": {**A, "thinking": "t"}}, (USER, FINAL, USER, THOUGHT, FINAL)),
        ({"prompt": "unused, as on the hub", "messages": [Q, A]}, (USER, FINAL)),
    ],
)
def test_conversations(row: dict, messages: tuple[Message, ...]) -> None:
    assert chat_messages(row) == messages


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": [Q], "chosen": [A], "rejected": [{**A, "content": "b"}]},
        {"messages": [Q], "chosen": A, "rejected": "b"},
        {"chosen": [Q, A], "rejected": [Q, {**A, "content": "b"}]},
        {"prompt": "q", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, {**A, "content": "b"}]},
    ],
)
def test_pairs(row: dict) -> None:
    assert preference_pair(row) == Pair((USER,), (FINAL,), (Message("assistant", "b", "final"),))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, "missing_field"),
        ({"prompt": "q"}, "missing_field"),
        ({"messages": "hello"}, "missing_field"),
        ({"messages": ["hello"]}, "missing_field"),
        ({"messages": []}, "role_order"),
        ({"messages": [Q]}, "role_order"),
        ({"messages": [A, Q]}, "role_order"),
        ({"messages": [Q, Q, A]}, "role_order"),
        ({"messages": [Q, A, A]}, "role_order"),
        ({"messages": [Q, A, T]}, "role_order"),
        ({"messages": [Q, {**T, "thinking": "t"}, A]}, "role_order"),
        ({"messages": [Q, A, {"role": "system", "content": "s"}]}, "role_order"),
        ({"messages": [Q, {"role": "tool", "content": "x"}]}, "unknown_role"),
        ({"messages": [Q, {**A, "channel": "commentary"}]}, "unknown_channel"),
        ({"messages": [{**Q, "channel": "final"}, A]}, "unknown_channel"),
        ({"messages": [Q, {**A, "tool_calls": [{"id": 1}]}]}, "tool_calls"),
        ({"messages": [Q, {**A, "content": " "}]}, "empty_field"),
        ({"messages": [Q, {**A, "thinking": ""}]}, "empty_field"),
        ({"messages": [Q, {**A, "content": [{"type": "text", "text": "a"}]}]}, "missing_field"),
        ({"messages": [Q, {**A, "content": "\ud800"}]}, "invalid_utf8"),
        ({"prompt": "q", "completion": "a\0"}, "nul"),
        ({"prompt": "q", "completion": [Q, A]}, "role_order"),
    ],
)
def test_what_is_no_conversation(row: dict, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        chat_messages(row)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "q", "chosen": "a"}, "missing_field"),
        ({"chosen": "a", "rejected": "b"}, "missing_field"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "equal_pair"),
        ({"prompt": "other", "chosen": [Q, A], "rejected": [Q, {**A, "content": "b"}]}, "different_prompts"),
        ({"chosen": [Q, A], "rejected": [{**Q, "content": "p"}, A]}, "different_prompts"),
        ({"prompt": "q", "chosen": [Q, A], "rejected": "b"}, "different_prompts"),
        ({"chosen": [Q], "rejected": [Q, A]}, "role_order"),
        ({"messages": [Q, A], "chosen": "a", "rejected": "b"}, "role_order"),
    ],
)
def test_what_is_no_pair(row: dict, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        preference_pair(row)
    assert caught.value.reason == reason
