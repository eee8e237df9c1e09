"""A conversation in the app: what a slot of the chat keeps from one run of the script to the next, and how it asks."""

from __future__ import annotations

import html
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_vpmoe.errors import visible
from vpmoe.app.models import Held
from vpmoe.app.shown import SPAN_COLOURS, coloured
from vpmoe.eval.asking import Form
from vpmoe.eval.conversation import Answer, Outcome, open_conversation
from vpmoe.eval.display import spell
from vpmoe.eval.pace import continued
from vpmoe.harmony.conversation import Message

_BETWEEN = 0.05
"""Seconds between two pictures of an answer that grows: a browser has to draw each."""


@dataclass
class Turn:
    """A question and what came of it; it grows while it is answered.

    Attributes:
        question: of the user.
        messages: of the model, each its channel and text.
        note: what is to be said of the answer.
        figures: how fast it came.
    """

    question: str
    messages: list[list[str]] = field(default_factory=list)
    note: str = "interrupted"
    figures: str = ""


@dataclass
class Slot:
    """One of the conversations that stand side by side.

    Attributes:
        model: path and stamp of the model that it is held with, and how it is given what is asked.
        said: what the model is told of earlier turns.
        turns: all that is shown.
    """

    model: tuple[Path, float, str] | None = None
    said: list[Message] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def with_model(self, model: tuple[Path, float, str]) -> None:
        """Begin anew where it is another one."""
        if self.model != model:
            self.model, self.said, self.turns = model, [], []


class _Streamed(Answer):
    def __init__(self, form: Form, turn: Turn, draw: Callable[[Turn], None]) -> None:
        super().__init__(form)
        self.messages = turn.messages
        self._turn, self._draw, self._next = turn, draw, 0.0

    def said(self, text: str) -> None:
        if time.monotonic() >= self._next:
            self._draw(self._turn)
            self._next = time.monotonic() + _BETWEEN


def ask(slot: Slot, held: Held, question: str, settings: dict[str, Any], draw: Callable[[Turn], None]) -> Outcome:
    """Ask the slot's model; the answer is drawn as it comes.

    Args:
        slot: gets the turn.
        held: its model.
        question: of the user.
        settings: of :func:`vpmoe.eval.conversation.open_conversation`.
        draw: shows a turn; what it raises ends the answer, which then stays as far as it came.

    Raises:
        VpmoeError: it cannot be asked; the turn is taken back.
    """
    turn = Turn(question)
    slot.turns.append(turn)
    try:
        with held.used() as opened:
            conversation = open_conversation(opened, **settings)
            conversation.messages = slot.said
            answer = _Streamed(conversation.form, turn, draw)
            outcome = conversation.ask(question, answer)
    except Exception:
        slot.turns.remove(turn)
        raise
    turn.note = note_of(outcome, answer, only_valid=settings["only_valid"])
    turn.figures = figures_of(outcome, cached=settings["cached"])
    draw(turn)
    return outcome


def note_of(outcome: Outcome, answer: Answer, *, only_valid: bool) -> str:
    """What is to be said of an answer; empty: nothing."""
    done = outcome.completion
    if done is None:
        return "interrupted"
    notes = []
    if done.finish == "length" and not only_valid:
        why = "the context is full" if outcome.fills_context else "the limit of new tokens"
        notes.append(f"cut after {len(done.ids):,} tokens: {why}")
    elif outcome.fault is not None:
        notes.append(f"not valid: {outcome.fault}")
    if not answer.messages:
        notes.append(f"outside of any message it wrote {visible(spell(done.ids, answer.tokenizer))!r}")
    if not answer.final.strip():
        notes.append("no answer: the conversation goes on without this turn")
    return "; ".join(notes)


def figures_of(outcome: Outcome, *, cached: bool) -> str:
    """How fast an answer came, in words."""
    pace, rate = outcome.pace, outcome.pace.tokens_per_second
    told = [
        f"{pace.tokens:,} tokens",
        *([] if rate is None else [f"{rate:,.1f} tokens/s"]),
        f"first after {pace.prefill_seconds:.2f} s ({outcome.prompt_tokens:,} of prompt)",
        f"KV cache {'on' if cached else 'off'}",
    ]
    return ", ".join(told)


def turn_html(turn: Turn) -> str:
    """The model's messages, analysis set apart from what is final."""
    parts = []
    for channel, words in turn.messages:
        is_final = channel == "final"
        heading = "" if is_final else f"<div><small>{html.escape(visible(channel) or 'no channel')}</small></div>"
        colour = SPAN_COLOURS.get(channel, SPAN_COLOURS["special"])
        edge = "" if is_final else f"border-left:3px solid rgb({colour});padding-left:.7em;opacity:.8;margin:.3em 0;"
        parts.append(f'<div style="{edge}">{heading}{coloured([(words, "", "")])}</div>')
    return "".join(parts) or "<div>…</div>"


def measure(held: Held, question: str, settings: dict[str, Any], tokens: int) -> list[dict[str, Any]]:
    """How fast a model answers with its KV cache and without, greedily and for as many tokens each time: a row each."""
    rows = []
    for cached in (True, False):
        with held.used() as opened:
            conversation = open_conversation(opened, **{**settings, "only_valid": False})
            ids = conversation.prompt(question)
            new = min(tokens, conversation.context - len(ids))
            done, pace = continued(opened.model, ids, new, conversation.form.stop_ids, cached=cached)
        rate = pace.tokens_per_second
        rows.append(
            {
                "KV cache": "on" if cached else "off",
                "tokens": pace.tokens,
                "tokens/s": None if rate is None else round(rate, 1),
                "first token, s": round(pace.prefill_seconds, 3),
                "ids": " ".join(map(str, done.ids[:12])),
            }
        )
    return rows


def times_as_fast(rows: Sequence[dict[str, Any]]) -> str:
    """How much faster the first row's tokens came than the second's, in words."""
    on, off = (row["tokens/s"] for row in rows)
    return f"{on / off:.1f} times as fast" if on and off else "too few tokens to tell"
