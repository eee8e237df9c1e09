"""Held-out questions: rows with a family and an answer that can be checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import read_json_lines
from vpmoe.errors import DataError

_REMEDY = "make them: vpmoe data synth-mini --output-dir data/synth_mini"


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        row: the whole row; ``query`` is the user's text, ``exercise`` the task family, ``synthetic_answer`` the answer.
    """

    row: dict[str, Any]

    @property
    def query(self) -> str:
        """The user's text."""
        return self.row["query"]

    @property
    def family(self) -> str:
        """The task family that the row is of."""
        return self.row["exercise"]

    @property
    def level(self) -> str:
        """How hard it is, by the family's own names."""
        return self.row.get("constraints", "")


def read_questions(path: Path, *, per_family: int | None = None) -> list[Question]:
    """The rows of a JSONL file as questions, in its order.

    Args:
        path: rows of the SYNTH schema.
        per_family: keep the first so many of each family; None keeps all.

    Raises:
        DataError: no such file, a line that is no row, or not one question.
    """
    if not path.is_file():
        raise DataError("there are no questions here", source=str(path), remedy=_REMEDY)
    questions = [_question(row, f"{path}:{number}") for number, row in read_json_lines(path, ours=False)]
    if per_family is not None:
        questions = first_of_each(questions, per_family, lambda question: question.family)
    if not questions:
        raise DataError("the file holds no question", source=str(path), remedy=_REMEDY)
    return questions


def _question(row: Any, place: str) -> Question:
    wanted = ("query", "exercise", "synthetic_answer")
    missing = [name for name in wanted if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if missing:
        raise DataError(f"the row has no text in {', '.join(missing)}", source=place, remedy=_REMEDY)
    return Question(row)


def first_of_each(questions: Iterable[Question], count: int, kind: Callable[[Question], Hashable]) -> list[Question]:
    """The first ``count`` questions of each kind, in their order."""
    seen: Counter[Hashable] = Counter()
    kept = []
    for question in questions:
        seen[kind(question)] += 1
        if seen[kind(question)] <= count:
            kept.append(question)
    return kept
