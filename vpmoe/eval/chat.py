"""A conversation with a model, turn by turn, for a person or a pipe; only answers go to stdout."""

from __future__ import annotations

import io
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.errors import visible
from vpmoe.errors import HarmonyError, VpmoeError
from vpmoe.eval.asking import Form
from vpmoe.eval.conversation import Answer, Conversation, open_conversation
from vpmoe.eval.display import spell
from vpmoe.eval.inspection import weights_of
from vpmoe.eval.open_model import open_model
from vpmoe.eval.store_file import Keep, remembering
from vpmoe.harmony.vocabulary import knows_conversations

if TYPE_CHECKING:
    from rich.console import Console

_COMMANDS = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C ends an answer"


def chat(
    where: Path,
    draw: Mapping[str, Any],
    *,
    system: str | None,
    developer: str | None,
    reasoning: str | None = None,
    only_valid: bool = False,
    context: int | None = None,
    store: Path | None = None,
    remember: Path | None = None,
    int8: bool = False,
    compiled: bool = False,
) -> None:
    """Answer each line of stdin, in the light of those before it, until it ends.

    Args are those of :func:`vpmoe.eval.sample.print_sample`, and:
        reasoning: effort that the system message asks for; None: what it says already.
        context: tokens of the conversation and its next answer together; None: what it was trained on.
        remember: takes in each conversation as it ends, up to its last answer that was not cut.

    Raises:
        CheckpointError, WeightsError, TokenizerError: no model there, or it lacks something.
        HarmonyError: its vocabulary has no conversations, or its system message no effort to change.
        DataError: unusable sampling options.
    """
    from rich.console import Console

    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, style="dim")
    found_as = open_model(where, store=store, int8=int8, compiled=compiled)
    with found_as as found, remembering(found, remember) as (opened, keep):
        if not knows_conversations(opened.tokenizer):
            raise HarmonyError(
                f"the vocabulary of {opened.described} has no Harmony tokens",
                source=str(where),
                remedy="chat with a model that was taught conversations; vpmoe sample asks this one as plain text",
            )
        conversation = open_conversation(
            opened,
            draw,
            system=system,
            developer=developer,
            reasoning=reasoning,
            only_valid=only_valid,
            context=context,
            say=notes.print,
        )
        notes.print(f"{opened.described}, {conversation.context:,} tokens of context; {_COMMANDS}")
        for text in map(str.strip, _lines(notes)):
            if text == "/quit":
                break
            if text == "/reset":
                _end(conversation, keep, notes)
                notes.print("a new conversation")
            elif text.startswith("/") and " " not in text:
                notes.print(f"there is no command {visible(text)}; {_COMMANDS}")
            elif text:
                try:
                    _ask(conversation, text, notes)
                except VpmoeError as error:
                    notes.print(f"not asked: {error}")
        _end(conversation, keep, notes)


def _end(conversation: Conversation, keep: Keep | None, notes: Console) -> None:
    """Begin anew; what was said is kept where it is to be."""
    if keep is not None and conversation.ended:
        notes.print(keep(conversation.ended))
    conversation.messages.clear()
    conversation.ended = []


def _ask(conversation: Conversation, text: str, notes: Console) -> None:
    """Print the answer, and below it what is to be said of it."""
    from rich.console import Console

    answer = _Printed(conversation.form, Console(highlight=False, markup=False, soft_wrap=True))
    with _interrupts() as interrupted:
        outcome = conversation.ask(text, answer, stop=lambda: bool(interrupted))
    done = outcome.completion
    limit = "--context: the conversation fills it" if outcome.fills_context else "--max-new-tokens"
    if done is None:
        notes.print("interrupted")
    elif done.finish == "length" and conversation.grammar is None:
        notes.print(f"cut after {len(done.ids):,} tokens by {limit}")
    elif outcome.fault is not None:
        notes.print(f"not valid Harmony: {outcome.fault}")
    if done is not None and conversation.experts:
        mean = weights_of(done).mean(0)
        notes.print("routing: " + ", ".join(f"{n} {w:.2f}" for n, w in zip(conversation.experts, mean, strict=True)))
    if not answer.final.strip():
        if done is not None and not answer.messages:
            notes.print(f"it wrote, outside of any message: {visible(spell(done.ids, answer.tokenizer))}")
        notes.print("no answer: the conversation goes on without this turn")


class _Printed(Answer):
    """Prints each message behind the name of its channel, ``final`` plain."""

    def __init__(self, form: Form, console: Console) -> None:
        super().__init__(form)
        self._console = console

    def opened(self, channel: str) -> None:
        self._console.print(f"{visible(channel)}: ", end="", style="dim")

    def said(self, text: str) -> None:
        self._console.print(visible(text), end="", style="" if self.messages[-1][0] == "final" else "dim")

    def closed(self) -> None:
        self._console.print()


@contextmanager
def _interrupts() -> Iterator[list[int]]:
    """A list that Ctrl-C puts something into, instead of ending the process."""
    noted: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: noted.append(number))
    try:
        yield noted
    finally:
        signal.signal(signal.SIGINT, before)


def _lines(notes: Console) -> Iterator[str]:
    """Lines of stdin; at a terminal with a prompt, and Ctrl-C there takes back what was typed."""
    terminal = sys.stdin.isatty()
    if terminal:
        import readline  # noqa: F401 - input() then edits and remembers lines
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no UTF-8 is refused as a message
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            if terminal:
                notes.print()  # the shell's prompt begins a line
            return
        except KeyboardInterrupt:
            if not terminal:
                raise
            line = ""
            notes.print(f"\n{_COMMANDS}")
        yield line
