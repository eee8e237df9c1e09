"""Canaries: small exact checks that say early what a model has lost, such as copying, Harmony, or its end of a turn.

Every question has one right answer; samples have to be valid Harmony; the greedy answers to pinned prompts are kept,
and held against another model's. Lengths and repetition are told of all that is generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StringConstraints

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.files import sha256_of_json
from vpmoe.data_curation.tasks.registry import FAMILIES
from vpmoe.errors import DataError, HarmonyError
from vpmoe.eval.asking import AsConversation, Form, form_of
from vpmoe.eval.open_model import Opened, open_model, require_folder
from vpmoe.eval.questions import Question
from vpmoe.eval.scoring import Scored, answer
from vpmoe.eval.suites import suite_report
from vpmoe.eval.suites.canary_entries import Record, entries_of, output_of, record_of
from vpmoe.eval.suites.canary_questions import (
    AS_TEXT,
    COPYING,
    HARMONY,
    SPELLED,
    is_right,
    questions_of,
    read_as_text,
)
from vpmoe.eval.suites.pinned import Outputs, difference
from vpmoe.eval.suites.suite_settings import SizedSettings
from vpmoe.weights.geometry import process_groups

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel
    from megatron_vpmoe.runtime.signals import StopRequest

SUITE, PINNED, MEAN = "canaries", "pinned", "exact_mean"
TASKS = (AS_TEXT, COPYING, SPELLED, HARMONY, *FAMILIES, PINNED)
OTHERS = (AS_TEXT, HARMONY, PINNED)
"""Without a right answer that has to be generated."""
Say = Callable[[str], None]


class Settings(SizedSettings):
    """The file of the suite; items are those of each level."""

    max_new_tokens: int = Field(ge=1)
    temperature: float = Field(ge=1e-6)
    seed: int
    pinned: dict[str, Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]] = Field(min_length=1)
    """Prompts by name."""


@dataclass(frozen=True)
class Chosen:
    """What the command line chooses.

    Attributes:
        size: of the settings' sizes, or "all".
        items: of each level, whatever the size; None: as the size says.
        tasks: some of :data:`TASKS`; empty: all that the model's vocabulary allows for.
        leave_out: a named task that the model's vocabulary does not allow for is left out, not refused.
        against: a report of the canaries, or a model, whose pinned answers this one's are held against.
        system, developer, plain: how to ask, see :func:`vpmoe.eval.asking.form_of`.
        max_new_tokens, batch_size: instead of the settings'.
        context: tokens of prompt and answer together; None: as the model was trained.
        bf16: compute in bfloat16 or not; None: as the run did.
        output: the report; None: ``reports/eval/canaries/<checkpoint>.json``.
        overwrite: replace a finished report.
        quiet: no progress bars.
    """

    size: str = "smoke"
    tasks: tuple[str, ...] = ()
    against: Path | None = None
    system: str | None = None
    developer: str | None = None
    plain: bool = False
    max_new_tokens: int | None = None
    batch_size: int | None = None
    context: int | None = None
    bf16: bool | None = None
    output: Path | None = None
    overwrite: bool = False
    items: int | None = None
    quiet: bool = False
    leave_out: bool = False

    def limit(self, settings: Settings) -> int | None:
        """Items of each level; None: all."""
        return settings.limit(self.size) if self.items is None else self.items

    @property
    def instead(self) -> dict[str, int]:
        """What takes the place of settings."""
        given = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class Canaries:
    """What models are asked in one form, known to fit the context.

    Attributes:
        form: how a model is asked.
        asked: by task, the questions whose answers are generated.
        left_out: tasks that cannot be asked so, and why.
        texts: records of the prompts that are read alone.
        settings: how long answers get, how many at once, and how samples are drawn.
        context: tokens of prompt and answer together; None: any number.
    """

    form: Form
    asked: dict[str, list[Question]]
    left_out: dict[str, str]
    texts: list[Record]
    settings: Settings
    context: int | None

    @classmethod
    def of(cls, form: Form, chosen: Chosen, settings: Settings, context: int | None) -> Canaries:
        """What is chosen, of models that are asked in a form.

        Raises:
            ConfigError: there is no such task.
            HarmonyError: Harmony is asked of a model that has none.
            DataError: a prompt leaves no room for an answer.
        """
        names = known(chosen)
        asked, left_out = _asked(names, settings, chosen.limit(settings)), {}
        if HARMONY in asked and not isinstance(form, AsConversation):
            if chosen.tasks and not chosen.leave_out:
                remedy = "leave it out of the tasks" + (", or do not ask plainly" if chosen.plain else "")
                raise HarmonyError("this model is asked as plain text", source=f"tasks: {HARMONY}", remedy=remedy)
            del asked[HARMONY]
            left_out[HARMONY] = "asked as plain text"
        _check_room(form, asked, context)
        read = read_as_text(form, form.tokenizer) if AS_TEXT in names else ()
        texts = [{"task": AS_TEXT, "item": text, "correct": right} for text, right in read]
        return cls(form, asked, left_out, texts, settings, context)

    def answers(
        self, model: VPModel, *, quiet: bool = False, stop: StopRequest | None = None
    ) -> dict[str, list[Scored]]:
        """By task: greedy answers, and drawn ones of which Harmony is judged; a collective of all ranks.

        Raises:
            Interrupted: a rank was asked to stop.
        """
        limits = {"max_new_tokens": self.settings.max_new_tokens, "context": self.context}

        def ask(questions: Sequence[Question], label: str, **draw: Any) -> list[Scored]:
            how = {"batch_size": self.settings.batch_size, "label": None if quiet else label, "stop": stop}
            return answer(model, self.form, questions, is_right, **limits, **how, **draw)

        greedy = [question for name, questions in self.asked.items() if name != HARMONY for question in questions]
        given = iter(ask(greedy, SUITE))
        draw = {"temperature": self.settings.temperature, "seed": self.settings.seed}
        sampled = ask(self.asked.get(HARMONY, ()), HARMONY, **draw)
        return {
            name: sampled if name == HARMONY else [next(given) for _ in questions]
            for name, questions in self.asked.items()
        }

    def records(self, scored: Mapping[str, Sequence[Scored]]) -> list[Record]:
        """A line an item."""
        return self.texts + [
            record_of(name, one, self.form, None if name in OTHERS else one.exact)
            for name, answers in scored.items()
            for one in answers
        ]

    def numbers(self, records: Sequence[Record]) -> dict[str, Any]:
        """Of a report: ``tasks``, and of those with right answers the mean, ``exact_mean``."""
        entries = entries_of(records, self.settings.max_new_tokens)
        exact = {name: {**entry, "chance": 0.0} for name, entry in entries.items() if name not in OTHERS}
        return {"tasks": entries, **(suite_report.means({MEAN: tuple(exact)}, exact, records) if exact else {})}


def evaluate(path: Path, settings: Settings, chosen: Chosen, *, say: Say) -> dict[str, Any]:
    """Evaluate the model at ``path``, write report and items, and return the report; a collective of all ranks.

    Args:
        path: as :func:`vpmoe.eval.open_model.open_model` takes it.
        settings: of the suite.
        chosen: of the command line.
        say: takes a line about what is going on.

    Raises:
        CheckpointError, DataError, TokenizerError, ConfigError: something named does not exist or does not fit.
        HarmonyError: Harmony is asked of a model that has none.
        NotOursError: something else lies where the report belongs.
    """
    started = time.perf_counter()
    require_folder(path)
    known(chosen)
    settings = settings.model_copy(update=chosen.instead)
    against = chosen.against
    theirs = Outputs.read(against) if against is not None and not against.is_dir() else None
    with process_groups(), open_model(path, bf16=chosen.bf16) as opened:
        output = suite_report.output_for(SUITE, opened, chosen.output, overwrite=chosen.overwrite)
        canaries = _canaries_of(opened, settings, chosen, say)
        if against is not None and theirs is None:
            theirs = _pinned_of(against, settings, replace(chosen, tasks=(PINNED,)), say)
        scored = canaries.answers(opened.model, quiet=chosen.quiet)
        records = canaries.records(scored)
        report = {
            **suite_report.head(SUITE, opened, _settings_entry(canaries, chosen, opened)),
            "asked": canaries.form.entry,
            **canaries.numbers(records),
            "left_out": canaries.left_out,
            PINNED: _outputs(canaries, scored),
        }
        if theirs is not None:
            report["against"] = difference(Outputs.model_validate(report), theirs)
        report["wall_seconds"] = round(time.perf_counter() - started, 2)
        suite_report.write(output, report, records)
    say(f"{output} written")
    return report


def known(chosen: Chosen) -> tuple[str, ...]:
    """The tasks that are chosen; raises :class:`ConfigError` where there is no such task."""
    if unknown := [name for name in chosen.tasks if name not in TASKS]:
        remedy = f"choose among {', '.join(TASKS)}"
        raise ConfigError(f"there is no task {unknown[0]!r}", source="tasks", remedy=remedy)
    names = tuple(dict.fromkeys(chosen.tasks or TASKS))
    if chosen.against is not None and PINNED not in names:
        raise ConfigError("there is nothing to hold against it", source="--against", remedy=f"add {PINNED} to --tasks")
    return names


def _asked(names: Iterable[str], settings: Settings, count: int | None) -> dict[str, list[Question]]:
    """The questions of each task whose answers are generated, in the order of :data:`TASKS`."""
    right = {name: questions_of(name, count) for name in TASKS if name in names and name not in OTHERS}
    rows = ({"synth_id": name, "query": text, "exercise": PINNED} for name, text in settings.pinned.items())
    pinned = [Question({**row, "constraints": PINNED, "synthetic_answer": ""}) for row in rows]
    drawn = [question for name in FAMILIES if HARMONY in names for question in questions_of(name, count)[:count]]
    asked = {**right, HARMONY: [*drawn, *pinned], PINNED: pinned}
    return {name: asked[name] for name in TASKS if name in names and name in asked}


def _check_room(form: Form, asked: Mapping[str, Sequence[Question]], context: int | None) -> None:
    """Refuse a prompt that leaves no room for an answer; raises :class:`DataError`."""
    for name, question in ((name, question) for name, questions in asked.items() for question in questions):
        length = len(form.prompt(question.query))
        if context is not None and length >= context:
            raise DataError(
                f"the prompt has {length:,} tokens, and the context {context:,}",
                source=f"{name}: {question.row['synth_id']}",
                remedy="choose other tasks, shorten what is pinned, or widen the context on your word",
            )


def _canaries_of(opened: Opened, settings: Settings, chosen: Chosen, say: Say) -> Canaries:
    form = form_of(opened, plain=chosen.plain, system=chosen.system, developer=chosen.developer, say=say)
    return Canaries.of(form, chosen, settings, chosen.context or opened.context)


def _outputs(canaries: Canaries, scored: Mapping[str, Sequence[Scored]]) -> dict[str, Record]:
    return {one.question.row["synth_id"]: output_of(one, canaries.form) for one in scored.get(PINNED, ())}


def _pinned_of(path: Path, settings: Settings, chosen: Chosen, say: Say) -> Outputs:
    """The pinned answers of another model, which is asked now."""
    with open_model(path, bf16=chosen.bf16) as opened:
        canaries = _canaries_of(opened, settings, chosen, say)
        answers = _outputs(canaries, canaries.answers(opened.model, quiet=chosen.quiet))
        told = {"checkpoint": opened.entry, "vocabulary": opened.tokenizer.identity, "asked": canaries.form.entry}
        return Outputs.model_validate({**told, PINNED: answers})


def _settings_entry(canaries: Canaries, chosen: Chosen, opened: Opened) -> dict[str, Any]:
    settings = canaries.settings
    return {
        "form": canaries.form.entry["form"],
        "pinned_sha256": sha256_of_json(settings.pinned),
        "items": chosen.limit(settings),
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "context": canaries.context,
        "bf16": opened.cfg.training.bf16,
        "batch_size": settings.batch_size,
    }
