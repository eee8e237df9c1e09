"""Canaries: small exact checks that say early what a model has lost, such as copying, Harmony, or its end of a turn.

Every question has one right answer; samples have to be valid Harmony; the greedy answers to pinned prompts are kept,
and held against another model's. Lengths and repetition are told of all that is generated.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, StringConstraints

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.files import sha256_of_json
from vpmoe.data_curation.tasks.registry import FAMILIES
from vpmoe.errors import DataError, HarmonyError
from vpmoe.eval.asking import AsConversation, Form, form_of
from vpmoe.eval.open_model import Opened, open_model, require_folder
from vpmoe.eval.questions import Question
from vpmoe.eval.scoring import Checker, Scored, answer
from vpmoe.eval.suites import suite_report
from vpmoe.eval.suites.canary_entries import entries_of, output_of, record_of
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

SUITE, PINNED = "canaries", "pinned"
TASKS = (AS_TEXT, COPYING, SPELLED, HARMONY, *FAMILIES, PINNED)
_OTHERS = (AS_TEXT, HARMONY, PINNED)
"""Without a right answer to each question."""
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
        tasks: some of :data:`TASKS`; empty: all that the model's vocabulary allows for.
        against: a report of the canaries, or a model, whose pinned answers this one's are held against.
        system, developer, plain: how to ask, see :func:`vpmoe.eval.asking.form_of`.
        max_new_tokens, batch_size: instead of the settings'.
        context: tokens of prompt and answer together; None: as the model was trained.
        bf16: compute in bfloat16 or not; None: as the run did.
        output: the report; None: ``reports/eval/canaries/<checkpoint>.json``.
        overwrite: replace a finished report.
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

    @property
    def instead(self) -> dict[str, int]:
        """What takes the place of settings."""
        given = {"max_new_tokens": self.max_new_tokens, "batch_size": self.batch_size}
        return {name: value for name, value in given.items() if value is not None}


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
    names = _known(chosen)
    settings = settings.model_copy(update=chosen.instead)
    asked = _asked(names, settings, settings.limit(chosen.size))
    against = chosen.against
    theirs = Outputs.read(against) if against is not None and not against.is_dir() else None
    with process_groups(), open_model(path, bf16=chosen.bf16) as opened:
        output = suite_report.output_for(SUITE, opened, chosen.output, overwrite=chosen.overwrite)
        form = form_of(opened, plain=chosen.plain, system=chosen.system, developer=chosen.developer, say=say)
        left_out = {}
        if HARMONY in asked and not isinstance(form, AsConversation):
            if chosen.tasks:
                remedy = "leave it out of --tasks" + (", or leave out --plain" if chosen.plain else "")
                raise HarmonyError("this model is asked as plain text", source=f"--tasks {HARMONY}", remedy=remedy)
            del asked[HARMONY]
            left_out[HARMONY] = "asked as plain text"
        _check_room(form, asked, chosen.context or opened.context)
        if against is not None and theirs is None:
            theirs = _pinned_of(against, asked[PINNED], settings, chosen, say)
        scored = _answers(opened, form, asked, settings, chosen)
        records = [
            record_of(name, one, form, None if name in _OTHERS else one.exact)
            for name, answers in scored.items()
            for one in answers
        ]
        if AS_TEXT in names:
            texts = read_as_text(form, opened.tokenizer)
            records = [{"task": AS_TEXT, "item": text, "correct": right} for text, right in texts] + records
        report = {
            **suite_report.head(SUITE, opened, _settings_entry(settings, chosen, opened, form)),
            "asked": form.entry,
            "tasks": entries_of(records, settings.max_new_tokens),
            "left_out": left_out,
            PINNED: {one.question.row["synth_id"]: output_of(one, form) for one in scored.get(PINNED, ())},
        }
        if theirs is not None:
            report["against"] = difference(Outputs.model_validate(report), theirs)
        report["wall_seconds"] = round(time.perf_counter() - started, 2)
        suite_report.write(output, report, records)
    say(f"{output} written")
    return report


def _known(chosen: Chosen) -> tuple[str, ...]:
    if unknown := [name for name in chosen.tasks if name not in TASKS]:
        remedy = f"choose among {', '.join(TASKS)}"
        raise ConfigError(f"there is no task {unknown[0]!r}", source="--tasks", remedy=remedy)
    names = tuple(dict.fromkeys(chosen.tasks or TASKS))
    if chosen.against is not None and PINNED not in names:
        raise ConfigError("there is nothing to hold against it", source="--against", remedy=f"add {PINNED} to --tasks")
    return names


def _asked(names: Iterable[str], settings: Settings, count: int | None) -> dict[str, list[Question]]:
    """The questions of each task whose answers are generated, in the order of :data:`TASKS`."""
    right = {name: questions_of(name, count) for name in TASKS if name in names and name not in _OTHERS}
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
                remedy="choose other --tasks, shorten what is pinned in --config, or widen --context on your word",
            )


def _answers(
    opened: Opened, form: Form, asked: Mapping[str, Sequence[Question]], settings: Settings, chosen: Chosen
) -> dict[str, list[Scored]]:
    """By task: greedy answers, and drawn ones of which Harmony is judged."""

    def ask(questions: Sequence[Question], check: Checker, label: str, **draw: Any) -> list[Scored]:
        limits = {"max_new_tokens": settings.max_new_tokens, "context": chosen.context or opened.context}
        rows = settings.batch_size
        return answer(opened.model, form, questions, check, label=label, batch_size=rows, **limits, **draw)

    greedy = [question for name, questions in asked.items() if name != HARMONY for question in questions]
    given = iter(ask(greedy, is_right, SUITE))
    draw = {"temperature": settings.temperature, "seed": settings.seed}
    sampled = ask(asked.get(HARMONY, ()), is_right, HARMONY, **draw)
    return {name: sampled if name == HARMONY else [next(given) for _ in questions] for name, questions in asked.items()}


def _pinned_of(path: Path, pinned: Sequence[Question], settings: Settings, chosen: Chosen, say: Say) -> Outputs:
    """The pinned answers of another model, which is asked now."""
    with open_model(path, bf16=chosen.bf16) as opened:
        form = form_of(opened, plain=chosen.plain, system=chosen.system, developer=chosen.developer, say=say)
        _check_room(form, {PINNED: pinned}, chosen.context or opened.context)
        scored = _answers(opened, form, {PINNED: pinned}, settings, chosen)[PINNED]
        answers = {one.question.row["synth_id"]: output_of(one, form) for one in scored}
        told = {"checkpoint": opened.entry, "vocabulary": opened.tokenizer.identity, "asked": form.entry}
        return Outputs.model_validate({**told, PINNED: answers})


def _settings_entry(settings: Settings, chosen: Chosen, opened: Opened, form: Form) -> dict[str, Any]:
    return {
        "form": form.entry["form"],
        "pinned_sha256": sha256_of_json(settings.pinned),
        "size": chosen.size,
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "seed": settings.seed,
        "context": chosen.context or opened.context,
        "bf16": opened.cfg.training.bf16,
        "batch_size": settings.batch_size,
    }
