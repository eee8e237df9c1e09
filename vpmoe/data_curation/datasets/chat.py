"""Chat rows as datasets: conversations to imitate (``harmony_sft``), and pairs to prefer from (``harmony_preference``).

The files and signals are those of the distillation data. A conversation is as many documents as it has to be read anew
(:func:`~vpmoe.data_curation.datasets.chat_fit.as_read`); each turn is supervised in one of them. In a preference
dataset, document 2i of a shard is a chosen conversation and document 2i + 1 the rejected one of the same prompt; the
manifest says so by ``"pairs": true``.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any, Literal

from vpmoe.data_curation.conversations.chat_rows import KEYS, chat_messages, preference_pair, without_keys
from vpmoe.data_curation.datasets.chat_fit import AsRead, as_read, make_chat_fit, without_oldest_turn
from vpmoe.data_curation.datasets.encode import Documents, Encoded, RowEncoder
from vpmoe.data_curation.datasets.plan import BuildOptions, content_of
from vpmoe.data_curation.rows.files import Row
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.renderer import RenderedConversation, make_renderer
from vpmoe.harmony.spans import CONTEXT, aligned_to_labels, documents, loss_mask
from vpmoe.tokenizer.interface import Tokenizer

SFT_KIND = "harmony_sft"
PREFERENCE_KIND = "harmony_preference"


@dataclass(frozen=True, slots=True)
class ChatDataset:
    """What decides a dataset of chat rows.

    Attributes:
        base: length, split, vocabulary, renderer and strictness.
        pairs: rows are chosen against rejected; False: conversations.
        supervise: ``all`` assistant messages, or those of the ``last`` turn; of pairs it is always the last.
        id_field: column of the row's id, which then decides the split; None: the conversation (or the prompt) does.
        system_text, developer_text: of the messages that rows without a system message get, the latter where they have
            no developer message either; None: they stay without.
        ignore_fields: keys of rows and messages that are left unread.
    """

    base: BuildOptions
    pairs: bool = False
    supervise: Literal["all", "last"] = "all"
    id_field: str | None = None
    system_text: str | None = None
    developer_text: str | None = None
    ignore_fields: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.base.check_conversations()

    @property
    def step(self) -> str:
        """What the keyed step makes."""
        return "pairs" if self.pairs else "chat"

    @property
    def kind(self) -> str:
        """The manifest's kind."""
        return PREFERENCE_KIND if self.pairs else SFT_KIND

    def config(self) -> dict[str, Any]:
        """Everything that decides bytes but the pass."""
        base = self.base.as_manifest()
        del base["compact_vocab_size"]
        return {
            **base,
            "kind": self.kind,
            "supervise": "last" if self.pairs else self.supervise,
            "id_field": self.id_field,
            **self.base.split_config(self.id_field),
            "system_text": self.system_text,
            "developer_text": self.developer_text,
            "earlier_analysis": "dropped",
            "ignore_fields": sorted(set(self.ignore_fields)),
        }

    def entries(self) -> dict[str, Any]:
        """The split's rule, that documents come in pairs, and the system message that rows were given."""
        by = "prompt" if self.pairs else "conversation (under supervise all as far as its first answer)"
        return {
            "kind": self.kind,
            "split_rule": self.base.split_rule(f"row id, or the {by} as JSON where no id field is named"),
            "pairs": self.pairs,
            "prompts": {"system": self.system_text, "developer": self.developer_text},
        }

    def encoder(self, tokenizer: Tokenizer) -> ChatEncoder:
        """A fresh encoder."""
        return ChatEncoder(self, tokenizer)


class ChatEncoder(RowEncoder):
    """Rows -> documents; remembers the hash of every id."""

    def __init__(self, kind: ChatDataset, tokenizer: Tokenizer) -> None:
        super().__init__(kind.base, kind.id_field)
        self._kind, self._eod_id = kind, tokenizer.eod_id
        self._renderer = make_renderer(kind.base.renderer, tokenizer, kind.base.tokenizer_model)
        self._fit = make_chat_fit(tokenizer, kind.base.seq_len)
        self._ignored = {*kind.ignore_fields, *({kind.id_field, kind.base.split_field} - KEYS)}

    def _encode(self, row: Row) -> Encoded:
        """The row's conversation, or its two; none if it cannot fit.

        Raises:
            RowError: the row is no conversation or pair that can be trained on.
            TokenizerError: a text cannot be split.
        """
        return self._pair(row) if self._kind.pairs else self._conversation(row)

    def _conversation(self, row: Row) -> Encoded:
        messages = self._with_system(chat_messages(without_keys(row, self._ignored)))
        truncation, stored = Counter[str](), list[Documents]()
        read = as_read(self._renderer.render(messages))
        # What is answered alike behind the same beginning is learnt from every conversation that begins so.
        begun = messages[: 1 + next(place for place, message in enumerate(messages) if message.channel == "final")]
        if self._kind.supervise == "last":
            read, begun = [AsRead(read[-1].conversation, 1)], messages
        split, counted = self._split_of(row, content_of(begun))
        for conversation, turns in read:
            fitted, turns_dropped = self._fit(conversation)
            truncation.update(_turns(turns_dropped))
            truncation[fitted.branch] += 1
            truncation["analysis_tokens_cut"] += fitted.analysis_tokens_cut
            truncation["user_tokens_cut"] += fitted.user_tokens_cut
            if fitted.conversation is not None:
                stored.append(self._stored(fitted.conversation, turns))
        if not stored:
            return Encoded(split, None, dict(truncation), counted)
        counted = {**counted, "conversations": 1, "read_anew": len(stored) - 1}
        return Encoded(split, Documents.joined(stored), dict(truncation), counted)

    def _pair(self, row: Row) -> Encoded:
        pair = preference_pair(without_keys(row, self._ignored))
        prompt = self._with_system(pair.prompt)
        split, counted = self._split_of(row, content_of(prompt))
        sides = [
            as_read(self._renderer.render(prompt + side))[-1].conversation for side in (pair.chosen, pair.rejected)
        ]
        turns_dropped = 0
        # Both lie in one row, and both keep the same prompt: only whole turns go, from both.
        while sum(len(side) + 1 for side in sides) > self._kind.base.seq_len:
            shorter = [without_oldest_turn(side) for side in sides]
            if None in shorter:
                return Encoded(split, None, {"dropped_pair_too_long": 1}, counted)
            sides, turns_dropped = [side for side in shorter if side is not None], turns_dropped + 1
        stored = Documents.joined([self._stored(side, 1) for side in sides])
        return Encoded(split, stored, _turns(turns_dropped) or {"whole": 1}, {**counted, "pairs": 1})

    def _stored(self, conversation: RenderedConversation, turns: int) -> Documents:
        """With its last ``turns`` turns supervised."""
        tokens, span, lengths = documents((conversation,), self._eod_id)
        users = [index for index, message in enumerate(conversation.messages) if message.role == "user"]
        span[: sum(len(message) for message in conversation.messages[: users[-turns:][0]])] = CONTEXT
        aligned = aligned_to_labels(span, lengths)
        return Documents(tokens, loss_mask(aligned), aligned, lengths)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if messages[0].role == "system":
            return messages
        given = {"system": self._kind.system_text, "developer": self._kind.developer_text}
        own = {messages[0].role}
        return (*(Message(role, text) for role, text in given.items() if text and role not in own), *messages)


def _turns(dropped: int) -> dict[str, int]:
    return {"conversations_without_old_turns": 1, "turns_dropped": dropped} if dropped else {}
