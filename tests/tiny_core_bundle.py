"""A CORE bundle small enough for a test, with every kind of task and the corners of each."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

WORDS = ["red", "green", "blue", "two words", "signs", "Sarah", "12 apples", "a red house", "señor"]
TASKS = {
    "colors": ("multiple_choice", 3, "\nAnswer: ", 25),
    "plain": ("multiple_choice", 0, None, 50),
    "schemas": ("schema", 2, None, 50),
    "last_word": ("language_modeling", 0, None, 0),
    "questions": ("language_modeling", 2, "\nAnswer: ", 0),
}
_ANSWER = "\nAnswer: "
_CHOICE, _SCHEMA, _MODELLING = "multiple_choice", "schema", "language_modeling"
CORE = {
    "hellaswag_zeroshot": (_CHOICE, 0, None, 25),
    "jeopardy": (_MODELLING, 10, _ANSWER, 0),
    "bigbench_qa_wikidata": (_MODELLING, 10, None, 0),
    "arc_easy": (_CHOICE, 10, _ANSWER, 25),
    "arc_challenge": (_CHOICE, 10, _ANSWER, 25),
    "copa": (_CHOICE, 0, None, 50),
    "commonsense_qa": (_CHOICE, 10, None, 20),
    "piqa": (_CHOICE, 10, _ANSWER, 50),
    "openbook_qa": (_CHOICE, 0, None, 25),
    "lambada_openai": (_MODELLING, 0, None, 0),
    "hellaswag": (_CHOICE, 10, None, 25),
    "winograd": (_SCHEMA, 0, None, 50),
    "winogrande": (_SCHEMA, 0, None, 50),
    "bigbench_dyck_languages": (_MODELLING, 10, None, 0),
    "agi_eval_lsat_ar": (_CHOICE, 3, None, 25),
    "bigbench_cs_algorithms": (_MODELLING, 10, None, 0),
    "bigbench_operators": (_MODELLING, 10, None, 0),
    "bigbench_repeat_copy_logic": (_MODELLING, 10, None, 0),
    "squad": (_MODELLING, 10, None, 0),
    "coqa": (_MODELLING, 0, None, 0),
    "boolq": (_CHOICE, 10, _ANSWER, 62),
    "bigbench_language_identification": (_CHOICE, 10, None, 25),
}
"""The 22 tasks of CORE: kind, examples, what stands before an answer, and the percentage of guessing."""


def items_of(kind: str, count: int) -> list[dict[str, Any]]:
    """A pure function of its arguments; options share beginnings, and one is the beginning of another."""
    items: list[dict[str, Any]] = []
    for number in range(count):
        one, two, three = (WORDS[(number * step + 1) % len(WORDS)] for step in (1, 2, 4))
        if kind == "multiple_choice":
            choices = [one, f"{one} and {two}", f"the {three}", f"the {three}, {two} or {one}."]
            items.append({"query": f"Question: what is {number} {two}?", "choices": choices, "gold": number % 4})
        elif kind == "schema":
            options = [f"{one} met {three} because {one}", f"{one} met {three} because {two} {number}"]
            items.append({"context_options": options, "continuation": f"was {two}.", "gold": number % 2})
        else:
            items.append({"context": f' Here is {one}, and there is {two}. "So," said {three} ', "continuation": two})
    return items


def write_bundle(
    folder: Path,
    count: int = 12,
    *,
    without: str = "",
    tasks: Mapping[str, tuple[str, int, str | None, int]] = TASKS,
) -> Path:
    """The folder; ``without``: a task whose items are left out. Entries have keys of other harnesses, as the public."""
    entries = []
    for name, (kind, shots, delimiter, _) in tasks.items():
        entry: dict[str, Any] = {
            "label": name,
            "dataset_uri": f"some/{name}.jsonl",
            "num_fewshot": [shots],
            "icl_task_type": kind,
        }
        entry |= {"has_categories": True} if name == "jeopardy" else {}
        entries.append(entry if delimiter is None else {**entry, "continuation_delimiter": delimiter})
        path = folder / "eval_data" / "some" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != without:
            path.write_text("".join(json.dumps(item) + "\n" for item in items_of(kind, count)))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    table = "".join(f"{name},{chance}\n" for name, (*_, chance) in tasks.items())
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + table)
    return folder
