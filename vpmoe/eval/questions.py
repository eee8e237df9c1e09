"""Held-out questions: rows with a family and an answer that can be checked, and the prompts made of them."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.conversations.store import KIND as CONVERSATIONS_KIND
from vpmoe.data_curation.datasets.plan import KIND as DATASET_KIND
from vpmoe.data_curation.manifest import read_manifest
from vpmoe.errors import DataError
from vpmoe.harmony.conversation import Message
from vpmoe.harmony.renderer import FastRenderer
from vpmoe.tokenizer.interface import Tokenizer

_REMEDY = "make them: python -m vpmoe.data_curation.tasks.synth_mini --output-dir data/synth_mini"


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


def read_questions(path: Path, *, per_family: int | None = None) -> list[Question]:
    """The rows of a JSONL file as questions, in its order.

    Args:
        path: rows of the SYNTH schema.
        per_family: keep the first so many of each family; None keeps all.

    Raises:
        DataError: no such file, a line that is no row, or not one question.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DataError("there are no questions here", source=str(path), remedy=_REMEDY) from error
    questions = [_question(line, f"{path}:{number}") for number, line in enumerate(lines, 1)]
    if per_family is not None:
        questions = _first_of_each(questions, per_family)
    if not questions:
        raise DataError("the file holds no question", source=str(path), remedy=_REMEDY)
    return questions


def _question(line: str, place: str) -> Question:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise DataError(f"the line is not JSON: {error}", source=place, remedy=_REMEDY) from error
    wanted = ("query", "exercise", "synthetic_answer")
    missing = [name for name in wanted if not isinstance(row, dict) or not isinstance(row.get(name), str)]
    if missing:
        raise DataError(f"the row has no text in {', '.join(missing)}", source=place, remedy=_REMEDY)
    return Question(row)


def _first_of_each(questions: Iterable[Question], count: int) -> list[Question]:
    seen: Counter[str] = Counter()
    kept = []
    for question in questions:
        seen[question.family] += 1
        if seen[question.family] <= count:
            kept.append(question)
    return kept


def context_messages(conversations: Path, dataset: Path) -> tuple[Message, ...]:
    """The system and developer messages that stand before every user message of a built dataset.

    Args:
        conversations: folder of the Harmony conversations that the dataset was built from.
        dataset: folder of the built dataset; its manifest names the hash of the conversations' manifest.

    Raises:
        DataError: no conversations there, or the dataset was built from others.
    """
    prompts = read_manifest(conversations, CONVERSATIONS_KIND)["prompts"]
    path = conversations / "manifest.json"
    found, expected = sha256_of_file(path), read_manifest(dataset, DATASET_KIND)["input_manifest_sha256"]
    if found != expected:
        raise DataError(
            f"the manifest's sha256 is {found}, the dataset was built from {expected}",
            source=str(path),
            remedy="pass --conversations with the folder that the dataset was built from, or build the dataset again",
        )
    texts = (("system", prompts["system"]), ("developer", prompts["developer"]))
    return tuple(Message(role, text) for role, text in texts if text)


def prompt_ids(tokenizer: Tokenizer, context: Sequence[Message], queries: Sequence[str]) -> list[list[int]]:
    """Token ids of each conversation up to and with ``<|start|>assistant``."""
    renderer = FastRenderer(tokenizer)
    return [renderer.generation_prompt([*context, Message("user", query)]).tolist() for query in queries]
