"""How a question becomes a prompt and a generation becomes an answer: as a Harmony conversation, or as plain text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.manifest import PromptsEntry
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.turns import generation_ends
from vpmoe.data_curation.tasks import question_texts
from vpmoe.errors import HarmonyError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.grammar import completion_automaton
from vpmoe.harmony.parse import Judgement, Parser
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.harmony.vocabulary import knows_conversations
from vpmoe.progress import Progress
from vpmoe.tokenizer.interface import Tokenizer

if TYPE_CHECKING:
    import numpy as np

    from megatron_vpmoe.generation.sampling import SamplingOptions
    from megatron_vpmoe.model.gpt import VPModel
    from megatron_vpmoe.runtime.signals import StopRequest
    from vpmoe.eval.open_model import Opened

_LINE_FEED = b"\n"


def stop_ids(tokenizer: Tokenizer, *, at_line_feed: bool = False) -> tuple[int, ...]:
    """Tokens that end a generation; ``at_line_feed``: any token with a line feed in it too."""
    ends = set(generation_ends(tokenizer.special_tokens).values())
    if at_line_feed:
        ends |= {row for row, piece in enumerate(tokenizer.pieces()) if _LINE_FEED in piece}
    return tuple(sorted({*ends, tokenizer.eod_id}))


@dataclass(frozen=True)
class AsConversation:
    """A Harmony conversation, with ``context`` (system and developer messages) before the user's message."""

    tokenizer: Tokenizer
    context: tuple[Message, ...] = ()

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a generation."""
        return stop_ids(self.tokenizer)

    def prompt(self, query: str, earlier: Sequence[Message] = ()) -> list[int]:
        """Token ids of the conversation up to and with ``<|start|>assistant``; ``earlier``: the turns before."""
        messages = [*self.context, *earlier, Message("user", query)]
        return FastRenderer(self.tokenizer).generation_prompt(messages).tolist()

    @property
    def opening(self) -> list[int]:
        """Token ids of the <|start|>assistant that a prompt ends with and :meth:`judge` takes as said."""
        return Parser(self.tokenizer).opening

    def judge(self, ids: Sequence[int]) -> Judgement:
        """Valid is analysis, then final, closed with <|return|>, nothing else; no id outside of the vocabulary."""
        if any(not 0 <= token_id < self.tokenizer.vocab_size for token_id in ids):
            return Judgement(False, "outside_vocabulary", None, None)
        return Parser(self.tokenizer).judge_completion(ids)

    @property
    def automaton(self) -> tuple[np.ndarray, frozenset[int]]:
        """What `judge` calls valid, as :class:`megatron_vpmoe.generation.grammar.TokenGrammar` takes it."""
        return completion_automaton(self.tokenizer)

    @property
    def entry(self) -> dict[str, Any]:
        """For a report."""
        return {"form": "conversation"} | {message.role: message.content for message in self.context}


@dataclass(frozen=True)
class AsText:
    """Plain text, as :mod:`vpmoe.data_curation.tasks.question_texts` writes questions: the answer is the first line."""

    tokenizer: Tokenizer

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a generation."""
        return stop_ids(self.tokenizer, at_line_feed=True)

    def prompt(self, query: str) -> list[int]:
        """Token ids of the text up to where the answer begins."""
        return self.tokenizer.encode_ordinary(question_texts.prompt(query)).tolist()

    def judge(self, ids: Sequence[int]) -> Judgement:
        """Valid is what ends by itself."""
        known = [token_id for token_id in ids if 0 <= token_id < self.tokenizer.first_special_id]
        answer = self._answer_in(self.tokenizer.decode(known))
        reason = None if ids and ids[-1] in self.stop_ids else "unclosed"
        return Judgement(reason is None, reason, None, answer)

    def _answer_in(self, continuation: str) -> str:
        return question_texts.answer_in(continuation)

    @property
    def automaton(self) -> tuple[np.ndarray, frozenset[int]]:
        """There is none: any text is a text."""
        raise HarmonyError(
            "plain text has no grammar", source="--only-valid", remedy="leave out --only-valid, or the plain form"
        )

    @property
    def entry(self) -> dict[str, Any]:
        """For a report."""
        return {"form": "text"}


@dataclass(frozen=True)
class AsPassage(AsText):
    """Plain text that goes on: what is asked, an empty line, and the answer is all that follows to the text's end."""

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """What ends a generation."""
        return stop_ids(self.tokenizer)

    def prompt(self, query: str) -> list[int]:
        """Token ids of the text up to where the answer begins."""
        return self.tokenizer.encode_ordinary(f"{query}\n\n").tolist()

    def _answer_in(self, continuation: str) -> str:
        return continuation.strip()

    @property
    def entry(self) -> dict[str, Any]:
        """For a report."""
        return {"form": "passage"}


Form = AsConversation | AsText


def form_for(tokenizer: Tokenizer, prompts: PromptsEntry | None, *, plain: bool) -> Form:
    """How to ask a model that is trained on conversations with these messages, if its vocabulary knows any."""
    if plain or not knows_conversations(tokenizer):
        return AsText(tokenizer)
    texts = {} if prompts is None else prompts.model_dump()
    return AsConversation(tokenizer, _context(texts))


def form_of(
    opened: Opened,
    *,
    plain: bool,
    system: str | None,
    developer: str | None,
    say: Callable[[str], None],
    passage: bool = False,
) -> Form:
    """How to ask a model, and a line about where its system and developer messages come from.

    Args:
        opened: the model.
        plain: as plain text, even though the vocabulary knows conversations.
        passage: plain text too, to be gone on with instead of a question with its answer.
        system: instead of the stored system message; empty leaves it out, None takes the stored one.
        developer: the same for the developer message.
        say: told that line.

    Raises:
        HarmonyError: messages for a vocabulary without conversations, or together with ``plain``.
    """
    given = {role: text for role, text in (("system", system), ("developer", developer)) if text is not None}
    known = knows_conversations(opened.tokenizer)
    if plain or passage or not known:
        if given:
            plainly = "--passage" if passage else "--plain"
            raise HarmonyError(
                "plain text has no system and developer messages",
                source=", ".join(f"--{role}" for role in given),
                remedy="leave them out" + (f" or {plainly}" if known else ": the vocabulary has no Harmony tokens"),
            )
        if passage:
            say("given as plain text to go on with")
            return AsPassage(opened.tokenizer)
        say(f"asked as plain text{'' if known else ', as the vocabulary has no Harmony tokens'}")
        return AsText(opened.tokenizer)
    if opened.prompts is None:
        say(
            f"no system and developer messages are stored with {opened.path}: asked "
            + (f"with the {' and '.join(given)} message given" if given else "without any")
            + "; --system and --developer give them, --plain asks as plain text"
        )
    else:
        instead = f", but for the {' and '.join(given)} message given" if given else ""
        none = "" if opened.prompts else " (none)"
        say(f"system and developer messages as stored with {opened.path}{none}{instead}")
    texts = {message.role: message.content for message in opened.prompts or ()} | given
    return AsConversation(opened.tokenizer, _context(texts))


def _context(texts: Mapping[str, str | None]) -> tuple[Message, ...]:
    return tuple(Message(role, text) for role in ("system", "developer") if (text := texts.get(role)))


def decode_in_batches(
    model: VPModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    batch_size: int,
    *,
    label: str | None = "questions",
    context: int | None = None,
    stop: StopRequest | None = None,
) -> list[list[int]]:
    """New tokens of each prompt, in the order of the prompts; a collective of all ranks, which share the prompts out.

    Args:
        model: the bare model.
        prompts: each shorter than ``context``.
        sampling: how to choose tokens, and when to stop.
        batch_size: prompts that a rank decodes at once.
        label: of the progress that is shown; None shows none.
        context: tokens that prompt and answer have together at most; None: any number.
        stop: asked before each token.

    Raises:
        Interrupted: a rank was asked to stop.
    """
    from megatron.core import parallel_state

    from megatron_vpmoe.generation.engine import generate
    from megatron_vpmoe.generation.prompts import Completion, Prompt
    from megatron_vpmoe.runtime.signals import Interrupted

    asking = None if stop is None else stop.is_requested
    mine = -(-len(prompts) // parallel_state.get_data_parallel_world_size())
    with Progress(label or "", mine, unit="answers", quiet=label is None or distributed.rank() != 0) as progress:

        def count(completion: Completion) -> None:
            if completion.finish is not None:
                progress.add(1, len(completion.ids))

        asked = [Prompt(one, max_new_tokens=None if context is None else context - len(one)) for one in prompts]
        completions = generate(model, asked, sampling, rows=batch_size, watch=count, stop=asking)
    if stop is not None and stop.agreed():
        raise Interrupted
    return [one.ids for one in completions]
