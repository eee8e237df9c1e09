"""A served teacher as a training asks it (``training.teacher_server``): in the ids of the run's dataset."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import numpy as np

from megatron_vpmoe.annotation import FILLING_LOG_P
from megatron_vpmoe.sources import Passage
from megatron_vpmoe.teacher_records import Records, TeacherRecords
from megatron_vpmoe.training.frozen import TeacherRequest
from vpmoe.teacher.asking import Asking, Translation
from vpmoe.teacher.interface import Question
from vpmoe.teacher.server import ServerTeacher, Settings
from vpmoe.tokenizer import load_tokenizer
from vpmoe.tokenizer.hf_directory import HFDirectory


class Speaker:
    """See ``megatron_vpmoe.sources.Server``. It is asked as ``vpmoe data score`` asks, and its records are the same.

    Args:
        request: of the run.

    Raises:
        ServerError: it is not there, or serves another model, truncates, or gives fewer than K.
        TokenizerError: an id means something else to it.
    """

    def __init__(self, request: TeacherRequest) -> None:
        t, student = request.cfg.training, load_tokenizer(request.manifest.root)
        settings = Settings(
            str(t.teacher_server), t.served_model, concurrency=t.teacher_concurrency, timeout=t.teacher_timeout
        )
        vocabulary = None if t.teacher_tokenizer is None else HFDirectory(Path(t.teacher_tokenizer))
        self._teacher = ServerTeacher(settings, vocabulary)
        self._translation = Translation.of(student, self._teacher.tokenizer)
        self._asking = Asking(student, self._translation, None)
        self._records = None
        if request.top_k:
            self._records = TeacherRecords(count=request.top_k, vocab_size=student.vocab_size, coding="exact")
        self._meant, self._eod = student.vocab_size, request.manifest.tokenizer.eod_id
        self._open = ExitStack()
        self._open.enter_context(self._teacher.open(Question(request.top_k, 1.0, self._translation.among), student))

    def ask(self, passage: Passage) -> Future[Records]:
        """See ``Server``."""
        return self._teacher.threads.submit(partial(self._said_of, passage))

    def close(self) -> None:
        """See ``Server``."""
        self._open.close()

    def _said_of(self, passage: Passage) -> Records:
        # A student may sample what only fills its vocabulary up. No teacher has it: it is never likely to one, and what
        # follows is read as behind the end of a document.
        tokens, labels = (np.where(ids < self._meant, ids, self._eod) for ids in (passage.tokens, passage.labels))
        asked = self._asking.about(tokens, passage.positions, labels)
        ids, log_p, of_label = self._translation.back(self._teacher.answer(asked)).records
        records = ids, log_p, np.where(passage.labels < self._meant, of_label, np.float32(FILLING_LOG_P))
        if self._records is None:
            return records
        return self._records.decode(self._records.encode(records), self._teacher.told["name"])


speak = Speaker
"""What ``megatron_vpmoe.training.frozen`` imports."""
