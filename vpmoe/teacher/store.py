"""The store of a teacher's distributions: a dataset with records of its K likeliest ids beside its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.annotation import NO_RECORD
from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.manifest import Manifest, read_manifest
from megatron_vpmoe.teacher_records import Records, TeacherRecords
from vpmoe.errors import DataError
from vpmoe.steps import Say
from vpmoe.teacher.annotate import MEASURED, Annotating, Score
from vpmoe.teacher.asking import Asking, Translation
from vpmoe.teacher.interface import Answer, Question, Scorer, Teacher
from vpmoe.teacher.selection import Selection
from vpmoe.tokenizer import load_tokenizer

_LEAST = 1e-12
"""A tail below this counts as none (``model/output/terms.py``)."""


def score_dataset(
    dataset: Path,
    teacher: Teacher,
    output: Path,
    *,
    count: int,
    temperature: float = 1.0,
    coding: Literal["exact", "compact"] = "compact",
    reasoning: str | None = None,
    selection: Selection | None = None,
    overwrite: bool = False,
    quiet: bool = False,
    say: Say,
) -> Manifest:
    """A dataset like ``dataset`` at ``output``, with a teacher's records of its supervised positions.

    Args:
        dataset: of token files.
        teacher: who scores.
        output: folder to make.
        count: K.
        temperature: that the teacher's logits are divided by.
        coding: see :mod:`megatron_vpmoe.teacher_records`.
        reasoning: effort that the teacher's system message asks for; None: the stored one.
        selection: which conversations; None: all.
        overwrite, quiet, say: see :class:`vpmoe.teacher.annotate.Annotating`.

    Raises:
        TokenizerError: an id means something else to the teacher.
        DataError: K is more than the vocabulary has; and see :class:`vpmoe.teacher.annotate.Annotating`.
    """
    manifest, student, selection = read_manifest(dataset), load_tokenizer(dataset), selection or Selection()
    if count > student.vocab_size:
        raise DataError(
            f"K = {count}, the vocabulary has {student.vocab_size} ids", source="--top-k", remedy="ask for fewer"
        )
    if not 0 < temperature < float("inf"):
        raise DataError(f"no softmax has a temperature of {temperature}", source="--temperature", remedy="ask for 1")
    translation = Translation.of(student, teacher.tokenizer)
    asking = Asking(student, translation, reasoning)
    records = TeacherRecords(count=count, vocab_size=student.vocab_size, temperature=temperature, coding=coding)
    question = Question(count, temperature, translation.among)

    @contextmanager
    def open_scorer() -> Iterator[Score]:
        with teacher.open(question, student) as scorer:
            yield lambda documents: _scored(documents, scorer, asking, translation, records)

    return Annotating(
        manifest,
        (records.stored,),
        by={
            **teacher.identity,
            "records": records.model_dump(),
            "reasoning": reasoning or "as stored",
            "selection": selection.entry,
        },
        told=teacher.told,
        open_scorer=open_scorer,
        teacher=records,
        choose=selection.choose(manifest),
        summary=lambda sums: _summary(sums, manifest, records),
    ).make(output, overwrite=overwrite, quiet=quiet, say=say)


def _scored(
    documents: Iterable[Document], scorer: Scorer, asking: Asking, translation: Translation, records: TeacherRecords
) -> Iterator[list[dict[str, NDArray[Any]]]]:
    for answers in scorer.score(map(asking.conversation, documents)):
        batch = []
        for answer in map(translation.back, answers):
            content = records.encode(answer.records)
            measured = _measured(answer, records.decode(content, "what was just written"))
            batch.append({records.stored.name: content, MEASURED: measured})
        yield batch


def _measured(answer: Answer, read: Records) -> NDArray[np.float64]:
    """Summed in the manifest: documents, positions, captured and lost mass, short records, what the coding costs in KL,
    and log p of the labels."""
    (ids, log_p, of_label), lost = answer
    known = ids != NO_RECORD
    p = np.where(known, np.exp(log_p.astype(np.float64)), 0)
    log_q = np.zeros(ids.shape)
    # Both in the order of the ids; what fills up a record has no probability on either side.
    by_id = np.where(known, ids, np.iinfo(np.int32).max).argsort(1)
    of_read = np.where(read[1] > -99, read[0], np.iinfo(np.int32).max).argsort(1)
    np.put_along_axis(log_q, by_id, np.take_along_axis(read[1].astype(np.float64), of_read, 1), 1)
    tail, other = (np.maximum(1 - mass, _LEAST) for mass in (p.sum(1), np.where(known, np.exp(log_q), 0).sum(1)))
    cost = (p * np.where(known, log_p - log_q, 0)).sum(1) + tail * np.log(tail / other)
    short = (~known).any(1)
    sums = (len(ids), p.sum(), lost.sum(), short.sum(), cost.sum(), of_label.sum(dtype=np.float64))
    return np.array([1, *sums], np.float64)


def _summary(sums: NDArray[np.float64], manifest: Manifest, records: TeacherRecords) -> Mapping[str, Any]:
    if not len(sums):
        raise DataError(
            "no conversation is chosen, so there is nothing to score",
            source="--fraction, --token-budget or --selection",
            remedy="choose more of them",
        )
    documents, positions, captured, lost, short, cost, of_label = sums
    mean = 1 / max(positions, 1)
    rows = sum(entry.rows for entry in manifest.splits.values())
    return {
        "documents": int(documents),
        "coverage": documents / max(rows, 1),
        "positions": int(positions),
        "bytes_a_position": records.width,
        "mean_captured_mass": captured * mean,
        "mean_lost_mass": lost * mean,
        "short_records": int(short),
        "mean_coding_kl": cost * mean,
        "mean_label_log_p": of_label * mean,
    }
