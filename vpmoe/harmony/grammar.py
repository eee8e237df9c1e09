"""Valid completions as an automaton over token ids: what :meth:`vpmoe.harmony.parse.Parser.judge_completion` accepts.

An analysis message and a final one, closed with <|return|>; both contents are UTF-8 with something to read in them. A
token is a run of bytes and may end inside a character, so a content's state is what its last character still lacks.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from vpmoe.harmony.conversation import CHANNELS
from vpmoe.harmony.vocabulary import require_conversations
from vpmoe.tokenizer.interface import Tokenizer

_TRAIL = range(0x80, 0xC0)
# What a character lacks -> the bytes that may follow, and what it lacks then (Unicode 15, table 3-7); 0: nothing.
_UTF8: tuple[tuple[tuple[Iterable[int], int], ...], ...] = (
    (
        (range(0x80), 0),
        (range(0xC2, 0xE0), 1),
        ((0xE0,), 3),
        ((*range(0xE1, 0xED), 0xEE, 0xEF), 2),
        ((0xED,), 4),
        ((0xF0,), 5),
        (range(0xF1, 0xF4), 6),
        ((0xF4,), 7),
    ),
    ((_TRAIL, 0),),
    ((_TRAIL, 1),),
    ((range(0xA0, 0xC0), 1),),
    ((range(0x80, 0xA0), 1),),
    ((range(0x90, 0xC0), 2),),
    ((_TRAIL, 2),),
    ((range(0x80, 0x90), 2),),
)
_NEXT = [{byte: after for bytes_, after in rules for byte in bytes_} for rules in _UTF8]
_SPACES = {chr(code).encode() for code in range(0x3001) if chr(code).isspace()}
# (what the last character lacks, its bytes so far where nothing can be read yet and it may still become white space)
_State = tuple[int, bytes | None]


def _after(state: _State, byte: int) -> _State | None:
    lacks, begun = state
    after = _NEXT[lacks].get(byte)
    if after is None:
        return None
    begun = None if begun is None else begun + bytes([byte])
    if begun is None or not any(space.startswith(begun) for space in _SPACES):
        return after, None
    return after, begun if after else b""


def _reachable() -> list[_State]:
    """Every state of a content; the first is its beginning."""
    states: list[_State] = [(0, b"")]
    for state in states:  # grows
        found = (_after(state, byte) for byte in range(256))
        states += dict.fromkeys(after for after in found if after is not None and after not in states)
    return states


_STATES = _reachable()


def completion_automaton(tokenizer: Tokenizer) -> tuple[np.ndarray, frozenset[int]]:
    """Of completions behind ``<|start|>assistant``.

    Returns:
        int16 ``[states, vocab_size]``, the state after each token, -1 where it may not follow; state 0 is the first.
        And the states in which a completion is complete.

    Raises:
        TokenizerError: the vocabulary has no Harmony tokens.
    """
    require_conversations(tokenizer)
    special = tokenizer.special_tokens
    assistant = [special["<|start|>"], *tokenizer.encode_ordinary("assistant").tolist()]
    content = _content(tokenizer)
    rows: list[np.ndarray] = []

    def add(count: int) -> int:
        rows.extend(np.full(tokenizer.vocab_size, -1, dtype=np.int16) for _ in range(count))
        return len(rows) - count

    state = add(1)
    for channel, end in zip(CHANNELS, ("<|end|>", "<|return|>"), strict=True):
        opening = [special["<|channel|>"], *tokenizer.encode_ordinary(channel).tolist(), special["<|message|>"]]
        for token in opening if channel == CHANNELS[0] else [*assistant, *opening]:
            rows[state][token] = len(rows)
            state = add(1)
        add(len(content) - 1)
        for number, after in enumerate(content):
            rows[state + number][: len(after)] = np.where(after < 0, -1, state + after)
        closed = add(1)
        rows[state + _STATES.index((0, None))][special[end]] = closed
        state = closed
    return np.stack(rows), frozenset([state])


def _content(tokenizer: Tokenizer) -> np.ndarray:
    """int16 [states of a content, ordinary tokens]: the state after each token, by the one before; -1 if not UTF-8."""
    number: dict[_State | None, int] = {None: -1} | {state: place for place, state in enumerate(_STATES)}
    # One row more than states: where -1 leads, and stays.
    steps = np.array([[number[_after(state, byte)] for byte in range(256)] for state in _STATES] + [[-1] * 256])
    pieces = tokenizer.pieces()[: tokenizer.first_special_id]
    lengths = np.array([len(piece) for piece in pieces])
    table = np.full((len(_STATES), len(pieces)), -1, dtype=np.int16)
    for length in np.unique(lengths[lengths > 0]):
        (tokens,) = np.nonzero(lengths == length)
        data = np.frombuffer(b"".join(pieces[token] for token in tokens), dtype=np.uint8).reshape(-1, length)
        state = np.arange(len(_STATES))[:, None]
        for byte in data.T:
            state = steps[state, byte]
        table[:, tokens] = state
    return table
