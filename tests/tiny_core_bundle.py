"""A CORE bundle small enough for a test, with every kind of task and the corners of each."""

from __future__ import annotations

import json
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


def write_bundle(folder: Path, count: int = 12, *, without: str = "") -> Path:
    """The folder; ``without``: a task whose items are left out."""
    entries = []
    for name, (kind, shots, delimiter, _) in TASKS.items():
        entry = {"label": name, "dataset_uri": f"some/{name}.jsonl", "num_fewshot": [shots], "icl_task_type": kind}
        entries.append(entry if delimiter is None else {**entry, "continuation_delimiter": delimiter})
        path = folder / "eval_data" / "some" / f"{name}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        if name != without:
            path.write_text("".join(json.dumps(item) + "\n" for item in items_of(kind, count)))
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": entries}))
    table = "".join(f"{name},{chance}\n" for name, (*_, chance) in TASKS.items())
    (folder / "eval_meta_data.csv").write_text("Eval Task,Random baseline\n" + table)
    return folder
