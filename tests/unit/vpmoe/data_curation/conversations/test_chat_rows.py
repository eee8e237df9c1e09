"""Rows of every accepted form become the messages they say; anything else is refused with its reason."""

import pytest

from vpmoe.data_curation.conversations.chat_rows import Pair, chat_messages, preference_pair, without_keys
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
        ({"prompt": "q", "messages": [Q, A]}, (USER, FINAL)),
        ({"prompt": [Q], "messages": [Q, {**A, "reasoning": "t"}]}, (USER, THOUGHT, FINAL)),
        ({"messages": [Q, {**A, "reasoning_content": "t"}], "tools": None}, (USER, THOUGHT, FINAL)),
        (
            {"messages": [Q, {**A, "reasoning": "t\n", "thinking": "t", "name": ""}], "tools": []},
            (USER, THOUGHT, FINAL),
        ),
        ({"messages": [Q, {**A, "reasoning_content": " "}]}, (USER, FINAL)),
        ({"messages": [Q, {**A, "content": "<think>\nt\n</think>\n\na"}]}, (USER, THOUGHT, FINAL)),
        ({"messages": [Q, {**A, "content": "<think>\n\n</think>\n\na"}]}, (USER, FINAL)),
        ({"messages": [Q, {**A, "content": "<think>t</think>a", "reasoning": "t"}]}, (USER, THOUGHT, FINAL)),
        ({"prompt": "q", "completion": "<think>t</think>a"}, (USER, THOUGHT, FINAL)),
        ({"messages": [{**Q, "content": "what is <think>?"}, A]}, (Message("user", "what is <think>?"), FINAL)),
        (
            {"id": 1, "prompt_id": "x", "created_at": 2, "metadata": {"a": 1}, "messages": [{**Q, "id": 3}, A]},
            (USER, FINAL),
        ),
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
        ({"messages": [{**Q, "channel": "final"}, A]}, "unknown_key:channel"),
        ({"messages": [{**Q, "reasoning": "t"}, A]}, "unknown_key:reasoning"),
        ({"messages": [Q, {**A, "tool_calls": [{"id": 1}]}]}, "unknown_key:tool_calls"),
        ({"messages": [Q, {**A, "tool_call_id": "x"}]}, "unknown_key:tool_call_id"),
        ({"messages": [Q, {**A, "weight": 0}]}, "unknown_key:weight"),
        ({"messages": [{**Q, "name": "Ann"}, A]}, "unknown_key:name"),
        ({"messages": [{"from": "human", "value": "q"}]}, "unknown_role"),
        ({"messages": [Q, A], "tools": [{"name": "f"}]}, "unknown_key:tools"),
        ({"messages": [Q, A], "completion": "a"}, "unknown_key:completion"),
        ({"messages": [Q, A], "system": "s"}, "unknown_key:system"),
        ({"conversations": [{"from": "human", "value": "q"}]}, "unknown_key:conversations"),
        ({"messages": [Q, A], "prompt": "other"}, "different_prompts"),
        ({"messages": [Q, A], "prompt": [{**Q, "content": "p"}]}, "different_prompts"),
        ({"messages": [Q, {**A, "reasoning": "t", "thinking": "u"}]}, "two_reasonings"),
        ({"messages": [Q, {**A, "content": "<think>t</think>a", "thinking": "u"}]}, "two_reasonings"),
        ({"messages": [Q, {**A, "reasoning": {"effort": "low"}}]}, "missing_field"),
        ({"messages": [Q, {**A, "content": "<think>t</think>"}]}, "empty_field"),
        ({"messages": [Q, {**A, "content": "<think>t"}]}, "think_tag"),
        ({"messages": [Q, {**A, "content": "t</think>a"}]}, "think_tag"),
        ({"messages": [Q, {**A, "content": "<think>t</think>a<think>u</think>b"}]}, "think_tag"),
        ({"messages": [{**Q, "content": [{"type": "image_url"}, {"type": "text"}]}, A]}, "content_parts"),
        ({"messages": [Q, {**A, "content": " "}]}, "empty_field"),
        ({"messages": [Q, {**A, "content": [{"type": "text", "text": "a"}]}]}, "content_parts"),
        ({"messages": [Q, {**A, "content": "\ud800"}]}, "invalid_utf8"),
        ({"prompt": "q", "completion": "a\0"}, "nul"),
        ({"prompt": "q", "completion": [Q, A]}, "role_order"),
    ],
)
def test_what_is_no_conversation(row: dict, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        chat_messages(row)
    assert caught.value.reason == reason


def test_ignored_keys_are_left_unread_in_rows_and_messages() -> None:
    row = {"messages": [{**Q, "name": "Ann"}, {**A, "weight": 1.0}], "tools": [{}], "id": 1}
    assert without_keys(row, {"name", "weight", "tools"}) == {"messages": [Q, A], "id": 1}


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
        ({"prompt": "q", "messages": [A], "chosen": "a", "rejected": "b"}, "different_prompts"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "tools": "[{}]"}, "unknown_key:tools"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5}, "unknown_key:margin"),
        ({"messages": [Q, A], "chosen": "a", "rejected": "b"}, "role_order"),
    ],
)
def test_what_is_no_pair(row: dict, reason: str) -> None:
    with pytest.raises(RowError) as caught:
        preference_pair(row)
    assert caught.value.reason == reason
