"""Documents of a dataset as a teacher is asked about them: in its ids, in its reasoning mode; and its answers back."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.annotation import NO_RECORD
from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.turns import MESSAGE_END
from vpmoe.errors import DataError, TokenizerError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.prompts import with_reasoning_effort
from vpmoe.teacher.interface import Answer, Conversation
from vpmoe.tokenizer import CompactVocabulary, Tokenizer

_REMEDY = "name a teacher of the dataset's vocabulary (a compact one may be part of its), or build the dataset with its"


@dataclass(frozen=True)
class Translation:
    """Between a dataset's ids and a teacher's.

    Attributes:
        to_teacher: int64 [ids of the dataset].
        to_student: int32 [ids of the teacher]; NO_RECORD for one that the dataset has not.
        into_full: the dataset's vocabulary is a compact part of the teacher's.
    """

    to_teacher: NDArray[np.int64]
    to_student: NDArray[np.int32]
    into_full: bool

    @classmethod
    def of(cls, student: Tokenizer, teacher: Tokenizer | None) -> Translation:
        """Held id by id against the teacher's table of bytes.

        Args:
            student: the dataset's vocabulary.
            teacher: None: it has the ids of the dataset's, or of the full one that a compact one is part of, which its
                answers have to show.

        Raises:
            TokenizerError: an id means other bytes to the teacher, or is special to one of them alone.
        """
        full = isinstance(student, CompactVocabulary) and not isinstance(teacher, CompactVocabulary)
        # Of a compact vocabulary the map says where its ids lie in the full one.
        own = student.o200k_ids if full and isinstance(student, CompactVocabulary) else np.arange(student.vocab_size)
        if teacher is not None:
            _compare(student, teacher, own)
        rows = teacher.padded_vocab_size if teacher is not None else max(int(own.max()) + 1, student.padded_vocab_size)
        to_student = np.full(max(rows, int(own.max()) + 1), NO_RECORD, np.int32)
        to_student[own] = np.arange(len(own))
        return cls(own.astype(np.int64), to_student, full)

    @property
    def among(self) -> NDArray[np.int64]:
        """Int64, ascending: the teacher's ids that the dataset has."""
        return np.flatnonzero(self.to_student != NO_RECORD)

    def back(self, answer: Answer) -> Answer:
        """A teacher's answer in the dataset's ids; those that it has not fall to the tail."""
        (ids, log_p, of_label), lost = answer
        inside = (ids >= 0) & (ids < len(self.to_student))
        own = np.where(inside, self.to_student[np.where(inside, ids, 0)], NO_RECORD)
        if (own == NO_RECORD).any():
            lost = lost + np.where((own == NO_RECORD) & (ids != NO_RECORD), np.exp(log_p), 0).sum(1)
            order = (own == NO_RECORD).argsort(1, kind="stable")  # what is left of a record stays in front
            own, log_p = np.take_along_axis(own, order, 1), np.take_along_axis(log_p, order, 1)
            log_p = np.where(own == NO_RECORD, 0, log_p)
        records = own.astype(np.int32), log_p.astype(np.float32), of_label.astype(np.float32)
        return Answer(records, lost)


def _compare(student: Tokenizer, teacher: Tokenizer, own: NDArray[np.integer]) -> None:
    ours, theirs = student.pieces(), teacher.pieces()
    named = set(student.special_tokens.values())
    for place, row in enumerate(own.tolist()):
        if student.is_special(place) and place not in named:
            continue  # reserved: no text has it, and vocabularies spell it differently
        piece = theirs[row] if row < teacher.vocab_size else None
        if piece != ours[place] or student.is_special(place) != teacher.is_special(row):
            raise TokenizerError(
                f"id {place} of the dataset is {ours[place]!r}, to the teacher its id {row} is {piece!r}"
                + ("" if piece != ours[place] else ", and special to one of them alone"),
                source=f"{student.source} and {teacher.source}",
                remedy=_REMEDY,
            )


class Asking:
    """Turns documents into what a teacher is asked.

    Args:
        student: the dataset's vocabulary.
        translation: to the teacher's.
        reasoning: effort that the system message asks for; None: as it is stored.
    """

    def __init__(self, student: Tokenizer, translation: Translation, reasoning: str | None) -> None:
        self._student, self._translation, self._reasoning = student, translation, reasoning
        self._system = lru_cache(maxsize=64)(self._another_mode)

    def conversation(self, document: Document) -> Conversation:
        """A document of the dataset; its supervised positions, wherever they lie once the mode is another.

        Raises:
            HarmonyError: another mode is asked for, and the system message names none.
            DataError: it has no system message.
        """
        positions = np.flatnonzero(document.loss_mask[:-1])
        return self.about(document.tokens, positions, document.labels[positions])

    def about(
        self, written: NDArray[np.integer], positions: NDArray[np.int64], labels: NDArray[np.integer]
    ) -> Conversation:
        """As ``conversation``, of tokens of the dataset and some of their positions.

        Args:
            written: [S].
            positions: [N], ascending, whose successors are asked for.
            labels: [N].
        """
        written = written.astype(np.int32, copy=False)
        tokens, labels = self._translation.to_teacher[written], self._translation.to_teacher[labels]
        if self._reasoning is not None:
            end = np.flatnonzero(written == self._student.special_id(MESSAGE_END))
            begin = np.flatnonzero(written == self._student.special_id("<|message|>"))
            if not (len(end) and len(begin) and begin[0] < end[0]) or (len(positions) and positions[0] < end[0]):
                raise DataError(
                    "a document has no system message, so the teacher's mode cannot be another",
                    source=f"--reasoning {self._reasoning}",
                    remedy="leave out --reasoning",
                )
            header, content = written[: begin[0] + 1], written[begin[0] + 1 : end[0]]
            mode = self._system(header.tobytes(), content.tobytes())
            head = np.concatenate([tokens[: begin[0] + 1], mode])
            tokens, positions = np.concatenate([head, tokens[end[0] :]]), positions + len(head) - end[0]
        return Conversation(tokens, positions, labels)

    def _another_mode(self, header: bytes, content: bytes) -> NDArray[np.int64]:
        """The content of the system message, asking for another effort, in the teacher's ids."""
        student = self._student
        role = student.decode(np.frombuffer(header, np.int32)[1:-1].tolist())
        text = student.decode(np.frombuffer(content, np.int32).tolist())
        [message] = with_reasoning_effort([Message(role, text)], str(self._reasoning))
        if self._translation.into_full and isinstance(student, CompactVocabulary):
            return student.full.encode_ordinary(message.content).astype(np.int64)
        return self._translation.to_teacher[student.encode_ordinary(message.content)]
