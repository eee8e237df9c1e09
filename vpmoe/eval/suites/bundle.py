"""The CORE bundle on disk: its tasks as ``core.yaml`` declares them, their items, and what chance alone gets right."""

from __future__ import annotations

import csv
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from megatron_vpmoe.config import stored_faults
from megatron_vpmoe.config.settings_file import read_settings
from megatron_vpmoe.files import inside, read_json_lines
from vpmoe.errors import DataError

TASKS, BASELINES, DATA = "core.yaml", "eval_meta_data.csv", "eval_data"
Kind = Literal["multiple_choice", "schema", "language_modeling"]
Item = dict[str, Any]


class Task(BaseModel):
    """A task of ``core.yaml``; fields that only other harnesses read are left out."""

    model_config = ConfigDict(frozen=True)

    name: str = Field(alias="label")
    uri: str = Field(alias="dataset_uri")
    kind: Kind = Field(alias="icl_task_type")
    shots: tuple[Annotated[int, Field(ge=0)], ...] = Field(alias="num_fewshot", min_length=1)
    """Solved examples before each item; the first number counts."""
    delimiter: str = Field(" ", alias="continuation_delimiter")
    """Between a question and its answer."""
    chance: float = Field(0.0, ge=0, lt=1)
    """Accuracy of guessing, from the bundle's table of random baselines."""


class Bundle:
    """The tasks of a folder.

    Args:
        folder: holds ``core.yaml``, ``eval_meta_data.csv`` and ``eval_data/``.

    Raises:
        DataError: it does not, or they are of another form.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._remedy = "name the folder of a CORE bundle with --bundle, or leave it out to fetch the public one"
        chance = self._baselines()
        self.tasks: dict[str, Task] = {}
        for entry in self._entries():
            try:
                task = Task.model_validate(entry)
                task = Task.model_validate({**entry, "chance": chance.get(task.name, 0.0)})
            except ValidationError as error:
                faults = "; ".join(stored_faults(error))
                raise self._fault(f"the task {entry.get('label')!r} cannot be read: {faults}", TASKS) from error
            if task.name not in chance:
                raise self._fault(f"there is no random baseline of {task.name}", BASELINES)
            if task.name in self.tasks:
                raise self._fault(f"two tasks are called {task.name}", TASKS)
            self.tasks[task.name] = task

    def _fault(self, what: str, name: str) -> DataError:
        return DataError(what, source=str(self.folder / name), remedy=self._remedy)

    def _text(self, name: str) -> str:
        try:
            return read_settings(self.folder / name)
        except ValueError as error:
            raise self._fault(f"no CORE bundle: {error}", name) from error

    def _entries(self) -> list[Any]:
        try:
            read = yaml.safe_load(self._text(TASKS))
        except (yaml.YAMLError, RecursionError) as error:
            raise self._fault(f"this is no YAML: {error}", TASKS) from error
        entries = read.get("icl_tasks") if isinstance(read, dict) else None
        if not isinstance(entries, list) or not entries or not all(isinstance(entry, dict) for entry in entries):
            raise self._fault("there is no list of tasks under icl_tasks", TASKS)
        return entries

    def _baselines(self) -> dict[str, float]:
        rows = csv.DictReader(self._text(BASELINES).splitlines())
        try:
            return {row["Eval Task"]: float(row["Random baseline"]) / 100 for row in rows}
        except (KeyError, TypeError, ValueError) as error:
            raise self._fault(f"no table of Eval Task and Random baseline in percent: {error!r}", BASELINES) from error

    def file_of(self, name: str) -> Path:
        """Where the items of a task lie.

        Raises:
            DataError: the bundle does not know the task, or does not hold its items.
        """
        held = [task.name for task in self.tasks.values() if (self.folder / DATA / task.uri).is_file()]
        path = inside(self.folder / DATA, self.tasks[name].uri) if name in self.tasks else self.folder / TASKS
        if name not in held:
            what = f"the items of {name} are not in this bundle" if name in self.tasks else f"there is no task {name!r}"
            raise DataError(what, source=str(path), remedy=f"choose among --tasks {','.join(held)}")
        return path

    def read(self, name: str) -> list[Item]:
        """All items of a task, in the order of its file; raises :class:`DataError` for one of another form."""
        path, kind = self.file_of(name), self.tasks[name].kind
        items = []
        for number, item in read_json_lines(path, ours=False):
            if fault := _fault_of(item, kind):
                raise DataError(f"this is no item of {kind}: {fault}", source=f"{path}:{number}", remedy=self._remedy)
            items.append(item)
        if not items:
            raise DataError("there are no items here", source=str(path), remedy=self._remedy)
        return items


_TEXTS = {"multiple_choice": ("query",), "schema": ("continuation",), "language_modeling": ("context", "continuation")}
_OPTIONS = {"multiple_choice": "choices", "schema": "context_options"}


def _fault_of(item: Any, kind: Kind) -> str | None:
    if not isinstance(item, dict) or not all(isinstance(item.get(name), str) for name in _TEXTS[kind]):
        return f"it has no text in {', '.join(_TEXTS[kind])}"
    if kind == "language_modeling":
        return None if item["continuation"].strip() else "its continuation is empty"
    options, gold = item.get(_OPTIONS[kind]), item.get("gold")
    if not isinstance(options, list) or len(options) < 2 or not all(isinstance(one, str) for one in options):
        return f"it has no texts to choose among in {_OPTIONS[kind]}"
    if isinstance(gold, bool) or not isinstance(gold, int) or not 0 <= gold < len(options):
        return f"gold is {gold!r} of {len(options)} options"
    return None


def drawn(items: Sequence[Item], limit: int | None, seed: int) -> list[tuple[int, Item]]:
    """The items to evaluate, each with its place in the file: shuffled by the seed, and cut; None: all."""
    shuffled = list(enumerate(items))
    random.Random(seed).shuffle(shuffled)
    return shuffled[:limit]


def examples(items: Sequence[Item], place: int, count: int, seed: int) -> list[Item]:
    """The solved examples before item ``place``: drawn among the other items by ``seed + place``, so for every model
    the same; fewer where there are fewer."""
    others = [number for number in range(len(items)) if number != place]
    return [items[number] for number in random.Random(seed + place).sample(others, min(count, len(others)))]
