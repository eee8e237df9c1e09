"""A conversation with a model, turn by turn, for a person or a pipe; only answers go to stdout."""

from __future__ import annotations

import codecs
import io
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.errors import visible
from vpmoe.errors import HarmonyError, VpmoeError
from vpmoe.eval.asking import AsConversation, form_of, knows_conversations
from vpmoe.eval.display import spell
from vpmoe.eval.open_model import open_model
from vpmoe.harmony.conversation import Message, check_text
from vpmoe.harmony.prompts import with_reasoning_effort
from vpmoe.tokenizer.interface import Tokenizer

if TYPE_CHECKING:
    from rich.console import Console

    from megatron_vpmoe.generation.grammar import TokenGrammar
    from megatron_vpmoe.generation.sampling import SamplingOptions
    from megatron_vpmoe.model.gpt import VPModel

_COMMANDS = "/reset begins anew, /quit or Ctrl-D ends, Ctrl-C ends an answer"
_CONTEXT = 2048  # tokens, where nobody says what the model was trained on


def chat(
    where: Path,
    draw: Mapping[str, Any],
    *,
    system: str | None,
    developer: str | None,
    reasoning: str | None = None,
    only_valid: bool = False,
    context: int | None = None,
) -> None:
    """Answer each line of stdin, in the light of those before it, until it ends.

    Args are those of :func:`vpmoe.eval.sample.print_sample`, and:
        reasoning: effort that the system message asks for; None: what it says already.
        context: tokens of the conversation and its next answer together; None: what it was trained on.

    Raises:
        CheckpointError, WeightsError, TokenizerError: no model there, or it lacks something.
        HarmonyError: its vocabulary has no conversations, or its system message no effort to change.
        DataError: unusable sampling options.
    """
    from rich.console import Console

    from megatron_vpmoe.generation.grammar import TokenGrammar
    from megatron_vpmoe.generation.sampling import SamplingOptions

    notes = Console(stderr=True, highlight=False, markup=False, soft_wrap=True, style="dim")
    with open_model(where) as opened:
        if not knows_conversations(opened.tokenizer):
            raise HarmonyError(
                f"the vocabulary of {opened.described} has no Harmony tokens",
                source=str(where),
                remedy="chat with a model that was taught conversations; vpmoe sample asks this one as plain text",
            )
        form = form_of(opened, plain=False, system=system, developer=developer, say=notes.print)
        assert isinstance(form, AsConversation)
        if reasoning is not None:
            form = AsConversation(opened.tokenizer, with_reasoning_effort(form.context, reasoning))
        options = SamplingOptions(stop_ids=form.stop_ids, **draw)
        grammar = None
        if only_valid:
            grammar = TokenGrammar(*form.automaton)
            grammar.check(opened.model.vocab_size, options.max_new_tokens)
        longest = context or opened.context or _CONTEXT
        conversation = _Conversation(opened.model, form, options, grammar, longest, notes)
        notes.print(f"{opened.described}, {longest:,} tokens of context; {_COMMANDS}")
        for text in map(str.strip, _lines(notes)):
            if text == "/quit":
                break
            if text == "/reset":
                conversation.messages.clear()
                notes.print("a new conversation")
            elif text.startswith("/") and " " not in text:
                notes.print(f"there is no command {visible(text)}; {_COMMANDS}")
            elif text:
                try:
                    conversation.ask(text)
                except VpmoeError as error:
                    notes.print(f"not asked: {error}")


@dataclass
class _Conversation:
    """What was said, ``messages``: of each earlier turn the user's and the final one, as Harmony's rule has it.

    The rule: analysis is for the answer that it leads to, and is not read again.
    """

    model: VPModel
    form: AsConversation
    options: SamplingOptions
    grammar: TokenGrammar | None
    context: int
    notes: Console
    messages: list[Message] = field(default_factory=list)

    def ask(self, text: str) -> None:
        """Print the answer to the user's next message; a turn without one, even in part, does not count."""
        from rich.console import Console

        from megatron_vpmoe.generation.engine import generate
        from megatron_vpmoe.generation.prompts import Prompt

        check_text(text, "your message")
        prompt = self.form.prompt(text, self.messages)
        room = self.context - len(prompt)
        if room < 1:
            full = f"the context of {self.context:,} tokens is full: with this message there would be {len(prompt):,}"
            self.notes.print(f"not asked: {full}. Nothing was dropped; /reset begins anew, --context widens it")
            return
        answer = _Answer(self.form.tokenizer, Console(highlight=False, markup=False, soft_wrap=True))
        with _interrupts() as interrupted:
            done = generate(
                self.model,
                [Prompt(prompt, max_new_tokens=room)],
                self.options,
                grammar=self.grammar,
                watch=lambda completion: answer.take(completion.ids[-1]),
                stop=lambda: bool(interrupted),
            )
        answer.close()
        limit = "--max-new-tokens" if self.options.max_new_tokens <= room else "--context: the conversation fills it"
        if not done:
            self.notes.print("interrupted")
        elif done[0].finish == "length" and self.grammar is None:
            self.notes.print(f"cut after {len(done[0].ids):,} tokens by {limit}")
        elif not (verdict := self.form.judge(done[0].ids)).valid:
            self.notes.print(f"not valid Harmony: {verdict.reason}")
        if answer.final.strip():
            self.messages += [Message("user", text), Message("assistant", answer.final, "final")]
        else:
            if done and not answer.shown:
                self.notes.print(f"it wrote, outside of any message: {visible(spell(done[0].ids, answer.tokenizer))}")
            self.notes.print("no answer: the conversation goes on without this turn")


class _Answer:
    """Prints a completion token by token: each message behind the name of its channel, ``final`` plain."""

    def __init__(self, tokenizer: Tokenizer, console: Console) -> None:
        self.final, self.shown = "", False
        self.tokenizer, self._console = tokenizer, console
        self._header: list[int] = []
        self._channel: str | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def take(self, token: int) -> None:
        """The next token."""
        if self.tokenizer.is_special(token):
            self.close()
            if self.tokenizer.decode([token]) == "<|message|>":
                self.shown = True
                self._channel = spell(self._header, self.tokenizer)
                self._console.print(f"{visible(self._channel)}: ", end="", style="dim")
            self._header = []
        elif self._channel is None:
            self._header.append(token)
        else:  # an id outside of the vocabulary is a padding row of the embedding
            known = token < self.tokenizer.vocab_size
            piece = self.tokenizer.decode_bytes([token]) if known else spell([token], self.tokenizer).encode()
            self._say(self._decoder.decode(piece))

    def close(self) -> None:
        """The message that is being printed, if any, ends here."""
        if self._channel is not None:
            self._say(self._decoder.decode(b"", final=True))
            self._console.print()
            self._channel = None

    def _say(self, text: str) -> None:
        is_final = self._channel == "final"
        self.final += text * is_final
        self._console.print(visible(text), end="", style="" if is_final else "dim")


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
