"""A conversation with a model, turn by turn, whoever shows it: the terminal's chat and the app have it from here."""

from __future__ import annotations

import codecs
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from vpmoe.errors import DataError, HarmonyError
from vpmoe.eval.asking import AsConversation, AsText, Form, form_of
from vpmoe.eval.display import spell
from vpmoe.eval.inspection import mixed_experts
from vpmoe.eval.pace import Pace
from vpmoe.harmony.conversation import CHANNELS, Message, check_text
from vpmoe.harmony.parse import NO_ANALYSIS
from vpmoe.harmony.prompts import with_reasoning_effort
from vpmoe.tokenizer.interface import Tokenizer

if TYPE_CHECKING:
    from megatron_vpmoe.generation.grammar import TokenGrammar
    from megatron_vpmoe.generation.prompts import Completion
    from megatron_vpmoe.generation.sampling import SamplingOptions
    from megatron_vpmoe.model.gpt import VPModel
    from vpmoe.eval.open_model import Opened

CONTEXT = 2048
"""Tokens, where nobody says what the model was trained on."""


class Answer:
    """A completion read token by token: ``messages``, of each its channel and the text so far.

    Who shows it overrides ``opened``, ``said`` and ``closed``, which do nothing here. Plain text is one message on the
    channel ``final``.
    """

    def __init__(self, form: Form) -> None:
        self.messages: list[list[str]] = []
        self.tokenizer: Tokenizer = form.tokenizer
        self._plain = isinstance(form, AsText)
        self._header: list[int] = []
        self._open = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def opened(self, channel: str) -> None:
        """A message begins."""

    def said(self, text: str) -> None:
        """It goes on."""

    def closed(self) -> None:
        """It has ended."""

    @property
    def final(self) -> str:
        """What was said on the channel ``final``."""
        return "".join(text for channel, text in self.messages if channel == "final")

    def take(self, token: int) -> None:
        """The next token."""
        if self._plain and not self._open and not self.tokenizer.is_special(token):
            self._begin("final")
        if self.tokenizer.is_special(token):
            self.close()
            if self.tokenizer.decode([token]) == "<|message|>":
                self._begin(spell(self._header, self.tokenizer))
            self._header = []
        elif not self._open:
            self._header.append(token)
        else:  # an id outside of the vocabulary is a padding row of the embedding
            known = token < self.tokenizer.vocab_size
            piece = self.tokenizer.decode_bytes([token]) if known else spell([token], self.tokenizer).encode()
            self._say(self._decoder.decode(piece))

    def close(self) -> None:
        """The message that is being written, if any, ends here."""
        if self._open:
            self._say(self._decoder.decode(b"", final=True))
            self._open = False
            self.closed()

    def _begin(self, channel: str) -> None:
        self._open = True
        self.messages.append([channel, ""])
        self.opened(channel)

    def _say(self, text: str) -> None:
        self.messages[-1][1] += text
        self.said(text)


@dataclass(frozen=True)
class Outcome:
    """What came of a question.

    Attributes:
        prompt_tokens: of the conversation up to the answer.
        completion: None where it was interrupted.
        fault: what is wrong with the answer's form; None: nothing, or no more than that an analysis is missing which no
            system or developer message asks for.
        fills_context: the answer may have no more tokens than the context leaves, fewer than the options allow.
        pace: of its tokens, also where it was interrupted.
    """

    prompt_tokens: int
    completion: Completion | None
    fault: str | None
    fills_context: bool
    pace: Pace


@dataclass
class Conversation:
    """What was said, ``messages``: of each earlier turn the user's and the final one, as Harmony's rule has it.

    The rule: analysis is for the answer that it leads to, and is not read again. Plain text has no turns: each question
    is asked alone.

    ``ended``: token ids of the conversation, up to its last answer that was not cut.
    """

    model: VPModel
    form: Form
    options: SamplingOptions
    grammar: TokenGrammar | None
    context: int
    cached: bool = True
    messages: list[Message] = field(default_factory=list)
    ended: list[int] = field(default_factory=list)

    @property
    def experts(self) -> tuple[str, ...]:
        """Of a mixture, whose completions then tell their weights; none of other models."""
        return mixed_experts(self.model)

    def prompt(self, text: str) -> list[int]:
        """Token ids of the conversation with the user's next message, up to the answer.

        Raises:
            HarmonyError: the text cannot be said.
            DataError: the context is full.
        """
        check_text(text, "your message")
        prompt = self.form.prompt(text) if isinstance(self.form, AsText) else self.form.prompt(text, self.messages)
        if len(prompt) >= self.context:
            raise DataError(
                f"the context of {self.context:,} tokens is full: with this message there would be {len(prompt):,}",
                remedy="begin a new conversation, or allow a wider context. Nothing was dropped",
            )
        return prompt

    def ask(self, text: str, answer: Answer, stop: Callable[[], bool] | None = None) -> Outcome:
        """Let the model answer the user's next message; a turn without a final one, even in part, does not count.

        Args:
            text: what the user says.
            answer: is told token by token.
            stop: asked before each token; True gives the answer up.

        Raises:
            HarmonyError, DataError: as :meth:`prompt`.
        """
        from megatron_vpmoe.generation.engine import generate
        from megatron_vpmoe.generation.prompts import Prompt

        prompt = self.prompt(text)
        room = self.context - len(prompt)
        pace = Pace()

        def watch(completion: Completion) -> None:
            pace.tick()
            answer.take(completion.ids[-1])

        done = generate(
            self.model,
            [Prompt(prompt, max_new_tokens=room)],
            self.options,
            grammar=self.grammar,
            watch=watch,
            stop=stop,
            record_routing=self.cached and bool(self.experts),
            cached=self.cached,
        )
        answer.close()
        if answer.final.strip() and isinstance(self.form, AsConversation):
            self.messages += [Message("user", text), Message("assistant", answer.final, "final")]
            if done and done[0].finish == "stop":
                self.ended = [*prompt, *done[0].ids]
        reason = self.form.judge(done[0].ids).reason if done else None
        return Outcome(
            prompt_tokens=len(prompt),
            completion=done[0] if done else None,
            fault=None if reason == NO_ANALYSIS and not self._asks_for_analysis else reason,
            fills_context=room < self.options.max_new_tokens,
            pace=pace,
        )

    @property
    def _asks_for_analysis(self) -> bool:
        context = self.form.context if isinstance(self.form, AsConversation) else ()
        return any(CHANNELS[0] in message.content for message in context)


def open_conversation(
    opened: Opened,
    draw: Mapping[str, Any],
    *,
    plain: bool = False,
    passage: bool = False,
    system: str | None = None,
    developer: str | None = None,
    reasoning: str | None = None,
    only_valid: bool = False,
    context: int | None = None,
    cached: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> Conversation:
    """A new conversation.

    Args:
        opened: the model.
        draw: fields of :class:`megatron_vpmoe.generation.sampling.SamplingOptions`, but for ``stop_ids``.
        plain: as plain text, even though the vocabulary knows conversations.
        passage: as plain text to go on with.
        system: see :func:`vpmoe.eval.asking.form_of`.
        developer: likewise.
        reasoning: effort that the system message asks for; None: what it says already.
        only_valid: nothing but valid Harmony can be chosen.
        context: tokens of the conversation and its next answer together; None: what it was trained on.
        cached: as :func:`megatron_vpmoe.generation.engine.generate` takes it.
        say: told where system and developer message come from.

    Raises:
        HarmonyError: the system message has no effort to change, or plain text is asked for what it has not.
        DataError: unusable sampling options.
    """
    from megatron_vpmoe.generation.grammar import TokenGrammar
    from megatron_vpmoe.generation.sampling import SamplingOptions

    form = form_of(opened, plain=plain, passage=passage, system=system, developer=developer, say=say)
    if reasoning is not None:
        if isinstance(form, AsText):
            raise HarmonyError(
                "plain text has no reasoning effort", source="--reasoning", remedy="leave the effort as it is"
            )
        form = AsConversation(opened.tokenizer, with_reasoning_effort(form.context, reasoning))
    options = SamplingOptions(stop_ids=form.stop_ids, **draw)
    grammar = None
    if only_valid:
        grammar = TokenGrammar(*form.automaton)
        grammar.check(opened.model.vocab_size, options.max_new_tokens)
    return Conversation(opened.model, form, options, grammar, context or opened.context or CONTEXT, cached)
