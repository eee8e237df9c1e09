"""Evaluate a small run on questions whose answers can be checked: losses, Harmony validity, exact answers.

vpmoe eval nano runs/quickstart --questions data/synth_mini/test.jsonl
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.tasks.question_texts import ID_COLUMN
from vpmoe.data_curation.tasks.synth_mini import check
from vpmoe.errors import DataError
from vpmoe.eval.asking import Form, form_of
from vpmoe.eval.display import spell
from vpmoe.eval.open_model import Opened, open_model, require_folder
from vpmoe.eval.plots import plot_run, read_curves
from vpmoe.eval.questions import read_questions
from vpmoe.eval.scoring import Scored, answer, summarize
from vpmoe.eval.suites import suite_report
from vpmoe.tokenizer import Tokenizer

SUITE = "nano"
VERSION = 4
"""Of what is asked and reported; decides whether a keyed step's evaluation is done."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class NanoOptions:
    """What to evaluate with.

    Attributes:
        questions: JSONL of rows with answers.
        data_path: dataset whose valid split the losses are of; None takes the run's own, where it is there.
        teacher: a model that this one's distance on that split is told from; None: none.
        system, developer, plain: how to ask, see :func:`vpmoe.eval.asking.form_of`.
        per_family: questions of each family; None takes all.
        max_new_tokens: cut a generation after so many tokens; a cut one is not valid.
        batch_size: prompts decoded together.
        samples: decoded generations kept in the report, the same number of each family as far as it goes.
    """

    questions: Path
    data_path: Path | None = None
    teacher: Path | None = None
    system: str | None = None
    developer: str | None = None
    plain: bool = False
    per_family: int | None = None
    max_new_tokens: int = 256
    batch_size: int = 64
    samples: int = 8


def evaluate_and_plot(
    path: Path, options: NanoOptions, output: Path | None, *, overwrite: bool, progress: Progress
) -> dict[str, Any]:
    """Evaluate the model at ``path``; write report, items, the picture beside them (``.png``), and print a summary.

    Args:
        path: as :func:`vpmoe.eval.open_model.open_model` takes it.
        options: what to evaluate with.
        output: the report; None: ``reports/eval/nano/<checkpoint>.json``.
        overwrite: replace a finished report.
        progress: takes a line about what is going on.

    Raises:
        CheckpointError, DataError, TokenizerError: something named does not exist or does not fit the rest.
        NotOursError: something else lies where the report belongs.
    """
    if output is not None:
        suite_report.check_writable(output, overwrite=overwrite)

    def permitted(opened: Opened) -> None:  # known before the model answers for an hour
        suite_report.check_writable(output or suite_report.default_output(SUITE, opened), overwrite=overwrite)

    report, scored, opened = evaluate_model(path, options, progress=progress, permitted=permitted)
    output = output or suite_report.default_output(SUITE, opened)
    metrics = opened.run_directory / "metrics.jsonl" if opened.run_directory else None
    curves = read_curves(metrics) if metrics and metrics.is_file() else {}
    picture = output.with_suffix(".png")
    plot_run(curves, report["tasks"], picture, title=opened.described)
    # The report comes last: where there is one, there is its picture.
    suite_report.write(output, report, [_item(place, one) for place, one in enumerate(scored)])
    print(summary_lines(report))
    print(f"{output} and {picture.name} written")
    return report


def evaluate_model(
    path: Path, options: NanoOptions, *, progress: Progress, permitted: Callable[[Opened], None] = lambda opened: None
) -> tuple[dict[str, Any], list[Scored], Opened]:
    """The report on the model at ``path``, its generations, and what it is of; the model itself is closed again.

    Args:
        path: as above.
        options: as above.
        progress: as above.
        permitted: asked, by raising or not, once the model is open and before it answers.

    Raises:
        CheckpointError, DataError, TokenizerError: something named does not exist or does not fit the rest.
    """
    # Imported here: megatron.core takes seconds.
    from vpmoe.eval.valid_split import dataset_for, distance, valid_losses

    require_folder(path)
    questions = read_questions(options.questions, per_family=options.per_family)
    started = time.perf_counter()
    with open_model(path) as opened:
        permitted(opened)
        form = form_of(opened, plain=options.plain, system=options.system, developer=options.developer, say=progress)
        loaded = time.perf_counter()
        dataset = dataset_for(opened, options.data_path, progress)
        losses = {} if dataset is None else valid_losses(opened, dataset)
        if losses:
            progress(f"losses on the valid split: {_spelled(losses)}")
        to_teacher = None
        if options.teacher is not None:
            if dataset is None:
                raise DataError("nothing to compare on", source=str(path), remedy="name a dataset with --data-path")
            to_teacher = distance(opened, options.teacher, dataset)
        measured = time.perf_counter()
        scored = answer(
            opened.model, form, questions, check, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
        )
        finished = time.perf_counter()
        report = {
            **suite_report.head(SUITE, opened, _settings_entry(options, form)),
            "dataset": dataset and {"path": str(dataset.root), "manifest_sha256": dataset.sha256},
            "asked": form.entry,
            "losses": losses,
            "to_teacher": to_teacher,
            "tasks": summarize(scored),
            "wall_seconds": round(finished - started, 2),
            "seconds": {
                "load": round(loaded - started, 2),
                "losses": round(measured - loaded, 2),
                "generation": round(finished - measured, 2),
            },
            "samples": [_sample(item, opened.tokenizer) for item in _spread(scored, options.samples)],
        }
        return report, scored, opened


def summary_lines(report: dict[str, Any]) -> str:
    """The report's numbers as a few lines."""
    form = "valid Harmony" if report["asked"]["form"] == "conversation" else "ended"
    lines = [f"{tag:<17}{loss:8.4f} nats per token, whole valid split" for tag, loss in report["losses"].items()]
    if found := report["to_teacher"]:
        lines.append(f"{'KL to teacher':<17}{found['kl']:8.4f} nats per token there, to {found['teacher']['run']}")
    for name, entry in report["tasks"].items():
        lines.append(
            f"{name:<24}{entry['exact']:>5} of {entry['n']:<5}exact ({100 * entry['accuracy']:5.1f} %), "
            f"{form} {100 * entry['validity']:5.1f} %"
        )
    if faults := report["tasks"][suite_report.ALL]["faults"]:
        lines.append("faults: " + ", ".join(f"{reason} {count}" for reason, count in faults.items()))
    return "\n".join(lines)


def _settings_entry(options: NanoOptions, form: Form) -> dict[str, Any]:
    """What decides the numbers, and where it was found."""
    return {
        "questions": str(options.questions),
        "sha256": sha256_of_file(options.questions),
        "form": form.entry["form"],
        **{name: getattr(options, name) for name in ("per_family", "max_new_tokens", "samples")},
    }


def _item(place: int, scored: Scored) -> dict[str, Any]:
    """A question by its row's id, or where it has none by its place."""
    question, judgement = scored.question, scored.judgement
    asked = question.row.get(ID_COLUMN, place)
    verdict = {"correct": scored.exact, "valid": judgement.valid, "fault": judgement.reason}
    return {"task": question.family, "item": asked, **verdict, "tokens": len(scored.ids)}


def _sample(item: Scored, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "family": item.question.family,
        "query": item.question.query,
        "expected": item.question.row["synthetic_answer"],
        "completion": spell(item.ids, tokenizer),
        "ids": list(item.ids),
        "valid": item.judgement.valid,
        "fault": item.judgement.reason,
        "exact": item.exact,
    }


def _spread(scored: Sequence[Scored], count: int) -> Iterable[Scored]:
    """Up to ``count`` of them, the families taking turns."""
    families: dict[str, list[Scored]] = {}
    for item in scored:
        families.setdefault(item.question.family, []).append(item)
    turns = [item for turn in range(len(scored)) for members in families.values() for item in members[turn : turn + 1]]
    return turns[:count]


def _spelled(losses: dict[str, float]) -> str:
    return ", ".join(f"{tag.removeprefix('loss/')} {value:.4f}" for tag, value in losses.items())
