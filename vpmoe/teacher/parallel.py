"""A model in several processes, each with a batch at a time: any number of them says the same, in the same order."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing import current_process
from typing import Any, Protocol

import torch

from vpmoe.data_curation.datasets.workers import Crew, make_crew
from vpmoe.teacher.interface import Answer, Conversation, Question, Teacher
from vpmoe.tokenizer import Tokenizer


class _Batching(Teacher, Protocol):
    def batches(self, conversations: Iterable[Conversation]) -> Iterator[Sequence[Conversation]]: ...


class Parallel:
    """See ``Teacher``.

    Args:
        teacher: in each process; ``batches`` says what is scored together, and each batch is one answer.
        processes: how many; on GPUs the n-th has the n-th.
    """

    def __init__(self, teacher: _Batching, processes: int) -> None:
        self._teacher, self._processes = teacher, processes
        self.identity, self.told, self.tokenizer = teacher.identity, teacher.told, teacher.tokenizer

    @contextmanager
    def open(self, question: Question, student: Tokenizer | None) -> Iterator[_Scorer]:
        """See ``Teacher``."""
        sent: Any = copy.copy(self._teacher)
        sent.tokenizer = None  # large, and not read again
        with make_crew(_Worker, (sent, question), self._processes) as crew:
            yield _Scorer(crew, self._teacher)


class _Scorer:
    def __init__(self, crew: Crew, teacher: _Batching) -> None:
        self._crew, self._teacher = crew, teacher

    def score(self, conversations: Iterable[Conversation]) -> Iterator[list[Answer]]:
        """See ``Scorer``."""
        return self._crew("score", self._teacher.batches(conversations))


class _Worker:
    def __init__(self, teacher: Teacher, question: Question) -> None:
        if torch.cuda.is_available():
            number = int(current_process().name.rsplit("-", 1)[-1])
            torch.cuda.set_device(number % torch.cuda.device_count())
        self._opened = ExitStack()
        self._scorer = self._opened.enter_context(teacher.open(question, None))

    def score(self, batch: Sequence[Conversation]) -> list[Answer]:
        [answers] = self._scorer.score(batch)
        return answers
