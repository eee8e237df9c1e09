"""Chat rows as datasets: conversations to imitate (``harmony_sft``), and pairs to prefer from (``harmony_preference``).

The files and signals are those of the distillation data. In a preference dataset, document 2i of a shard is a chosen
conversation and document 2i + 1 the rejected one of the same prompt; the manifest says so by ``"pairs": true``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from vpmoe.data_curation.conversations.chat_rows import chat_messages, preference_pair
from vpmoe.data_curation.datasets.chat_fit import make_chat_fit, without_oldest_turn
from vpmoe.data_curation.datasets.plan import BuildOptions, split_of
from vpmoe.data_curation.datasets.shard import LabelledDocument, Unit
from vpmoe.data_curation.rows.files import Row
from vpmoe.errors import RowError
from vpmoe.harmony.choice import make_renderer
from vpmoe.harmony.conversation import Message, check_text
from vpmoe.harmony.renderer import RenderedConversation
from vpmoe.harmony.spans import CONTEXT, aligned_to_labels, document, loss_mask
from vpmoe.tokenizer.interface import Tokenizer

SFT_KIND = "harmony_sft"
PREFERENCE_KIND = "harmony_preference"
SUPERVISE = ("all", "last")
_SPLIT_RULE = (
    "valid iff the big-endian first 8 bytes of blake2b(row id, or the {} as JSON where no id field is named) are below "
    "valid_fraction * 2^64, else train"
)


@dataclass(frozen=True, slots=True)
class ChatDataset:
    """The job: what decides a dataset of chat rows.

    Attributes:
        base: length, split, vocabulary, renderer and strictness.
        pairs: rows are chosen against rejected; False: conversations.
        supervise: ``all`` assistant messages, or those of the ``last`` turn; of pairs it is always the last.
        id_field: column of the row's id, which then decides the split; None: the conversation (or the prompt) does.
        system_text: content of the system message of rows that have none; None: they stay without.
    """

    base: BuildOptions
    pairs: bool = False
    supervise: Literal["all", "last"] = "all"
    id_field: str | None = None
    system_text: str | None = None

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
            "system_text": self.system_text,
        }

    def manifest_entries(self) -> dict[str, Any]:
        """The split's rule, and that documents come in pairs."""
        rule = _SPLIT_RULE.format("prompt" if self.pairs else "conversation")
        return {
            "split_rule": {"rule": rule, "valid_fraction": self.base.valid_fraction},
            "pairs": self.pairs,
            "prompts": {"system": self.system_text, "developer": None},
        }

    def encoder(self, tokenizer: Tokenizer) -> ChatEncoder:
        """A fresh encoder."""
        return ChatEncoder(self, tokenizer)


class ChatEncoder:
    """Rows -> documents; nothing is remembered from row to row."""

    columns: tuple[str, ...] | None = None

    def __init__(self, job: ChatDataset, tokenizer: Tokenizer) -> None:
        self._job, self._eod_id = job, tokenizer.eod_id
        self._renderer = make_renderer(job.base.renderer, tokenizer, job.base.tokenizer_model)
        self._fit = make_chat_fit(tokenizer, job.base.seq_len)
        self.truncation: Counter[str] = Counter()
        self.documents: Counter[str] = Counter()

    def encode(self, row: Row) -> Unit | None:
        """The row's conversation, or its two; None if it cannot fit.

        Raises:
            RowError: the row is no conversation or pair that can be trained on.
            TokenizerError: a text cannot be split.
        """
        return self._pair(row) if self._job.pairs else self._conversation(row)

    def take_state(self) -> bytes:
        """Nothing."""
        return b""

    def restore(self, state: bytes) -> None:
        """Nothing to do."""

    def _conversation(self, row: Row) -> Unit | None:
        messages = self._with_system(chat_messages(row))
        split = self._split(row, messages)
        fitted, turns_dropped = self._fit(self._renderer.render(messages))
        self._count_turns(turns_dropped)
        self.truncation[fitted.branch] += 1
        self.truncation["analysis_tokens_cut"] += fitted.analysis_tokens_cut
        self.truncation["user_tokens_cut"] += fitted.user_tokens_cut
        if fitted.conversation is None:
            return None
        self.documents["conversations"] += 1
        return Unit(split, (self._labelled(fitted.conversation, last=self._job.supervise == "last"),))

    def _pair(self, row: Row) -> Unit | None:
        pair = preference_pair(row)
        prompt = self._with_system(pair.prompt)
        split = self._split(row, prompt)
        sides = [self._renderer.render(prompt + side) for side in (pair.chosen, pair.rejected)]
        turns_dropped = 0
        # Both lie in one row, and both keep the same prompt: only whole turns go, from both.
        while sum(len(side) + 1 for side in sides) > self._job.base.seq_len:
            shorter = [without_oldest_turn(side) for side in sides]
            if None in shorter:
                self.truncation["dropped_pair_too_long"] += 1
                return None
            sides, turns_dropped = [side for side in shorter if side is not None], turns_dropped + 1
        self._count_turns(turns_dropped)
        self.truncation["whole"] += turns_dropped == 0
        self.documents["pairs"] += 1
        return Unit(split, tuple(self._labelled(side, last=True) for side in sides))

    def _labelled(self, conversation: RenderedConversation, *, last: bool) -> LabelledDocument:
        tokens, span = document(conversation, self._eod_id)
        if last:
            users = [index for index, message in enumerate(conversation.messages) if message.role == "user"]
            span[: sum(len(message) for message in conversation.messages[: users[-1] + 1])] = CONTEXT
        aligned = aligned_to_labels(span, np.array([len(span)], dtype=np.int64))
        return LabelledDocument(tokens, loss_mask(aligned), aligned)

    def _with_system(self, messages: tuple[Message, ...]) -> tuple[Message, ...]:
        if self._job.system_text is None or messages[0].role == "system":
            return messages
        return (Message("system", self._job.system_text), *messages)

    def _split(self, row: Row, messages: Sequence[Message]) -> str:
        if self._job.id_field is None:
            texts = [[message.role, message.channel, message.content] for message in messages]
            return split_of(json.dumps(texts, ensure_ascii=False), self._job.base.valid_fraction)
        value = row.get(self._job.id_field)
        if isinstance(value, bytes):
            raise RowError("invalid_utf8", f"{self._job.id_field} is not UTF-8")
        key = str(value) if isinstance(value, int) else value
        check_text(key, self._job.id_field)
        return split_of(str(key), self._job.base.valid_fraction)

    def _count_turns(self, dropped: int) -> None:
        if dropped:
            self.truncation["conversations_without_old_turns"] += 1
            self.truncation["turns_dropped"] += dropped
