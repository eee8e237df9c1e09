"""Evaluate a small run on questions whose answers can be checked: losses, Harmony validity, exact answers.

vpmoe eval nano runs/quickstart --questions data/synth_mini/test.jsonl
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.tasks.question_texts import ID_COLUMN
from vpmoe.data_curation.tasks.synth_mini import check
from vpmoe.eval.asking import Form, form_of
from vpmoe.eval.display import spell
from vpmoe.eval.open_model import Opened, open_model, require_folder
from vpmoe.eval.plots import plot_run, read_curves
from vpmoe.eval.questions import read_questions
from vpmoe.eval.scoring import Scored, answer, summarize
from vpmoe.eval.suites import suite_report
from vpmoe.tokenizer import Tokenizer

if TYPE_CHECKING:
    from megatron_vpmoe.manifest import Manifest

SUITE = "nano"
VERSION = 3
"""Of what is asked and reported; decides whether a keyed step's evaluation is done."""
Progress = Callable[[str], None]


@dataclass(frozen=True)
class NanoOptions:
    """What to evaluate with.

    Attributes:
        questions: JSONL of rows with answers.
        data_path: dataset whose valid split the losses are of; None takes the run's own, where it is there.
        system, developer, plain: how to ask, see :func:`vpmoe.eval.asking.form_of`.
        per_family: questions of each family; None takes all.
        max_new_tokens: cut a generation after so many tokens; a cut one is not valid.
        batch_size: prompts decoded together.
        samples: decoded generations kept in the report, the same number of each family as far as it goes.
    """

    questions: Path
    data_path: Path | None = None
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
    require_folder(path)
    questions = read_questions(options.questions, per_family=options.per_family)
    started = time.perf_counter()
    with open_model(path) as opened:
        permitted(opened)
        form = form_of(opened, plain=options.plain, system=options.system, developer=options.developer, say=progress)
        loaded = time.perf_counter()
        dataset = dataset_for(opened, options.data_path, progress)
        losses = {} if dataset is None else valid_losses(opened, dataset)
        measured = time.perf_counter()
        if losses:
            progress(f"losses on the valid split: {_spelled(losses)}")
        scored = answer(
            opened.model, form, questions, check, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
        )
        finished = time.perf_counter()
        report = {
            **suite_report.head(SUITE, opened, _settings_entry(options, form)),
            "dataset": dataset and {"path": str(dataset.root), "manifest_sha256": dataset.sha256},
            "asked": form.entry,
            "losses": losses,
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
    for name, entry in report["tasks"].items():
        lines.append(
            f"{name:<24}{entry['exact']:>5} of {entry['n']:<5}exact ({100 * entry['accuracy']:5.1f} %), "
            f"{form} {100 * entry['validity']:5.1f} %"
        )
    if faults := report["tasks"][suite_report.ALL]["faults"]:
        lines.append("faults: " + ", ".join(f"{reason} {count}" for reason, count in faults.items()))
    return "\n".join(lines)


def dataset_for(opened: Opened, data_path: Path | None, progress: Progress) -> Manifest | None:
    """The dataset to measure losses on; None, and a word on it, where the model has none any more.

    Raises:
        DataError: the one asked for is not there.
        TokenizerError: its ids mean something else than the model's.
    """
    from megatron_vpmoe.manifest import PREFERENCE, read_manifest

    folder = data_path
    if folder is None:
        folder = Path(opened.cfg.data.parts[0].path) if opened.trained else None
        if folder is None or not (folder / "manifest.json").is_file():
            progress(f"no losses are measured: there is no dataset at {folder or '--data-path'}")
            return None
    manifest = read_manifest(folder)
    if data_path is None and manifest.kind == PREFERENCE:
        progress(f"no losses are measured: {folder} holds pairs; --data-path names conversations")
        return None
    opened.require_vocabulary(manifest)
    return manifest


def valid_losses(opened: Opened, manifest: Manifest) -> dict[str, float]:
    """The objective's ``loss/*`` over the whole valid split, each a mean over all its supervised tokens, in nats."""
    from megatron_vpmoe.data.blend import Part
    from megatron_vpmoe.data.kd_dataset import KDDataset
    from megatron_vpmoe.objectives import build_objective, check_kinds
    from megatron_vpmoe.sources import ValidSource
    from megatron_vpmoe.training.evaluate import evaluate

    data = {"data_path": str(manifest.root), "blend": None, "blend_schedule": None}
    training: dict[str, Any] = {}
    # Stored conversations hold nothing of what preferences and rewards are learned from.
    imitates = opened.trained is not None and not build_objective(opened.trained).needs.annotations
    if opened.trained is None:
        data["seq_length"] = manifest.seq_length
    if not imitates:
        training["objective"] = "token_ce" if manifest.kind == "healing_text" else "span_ce"  # text has no spans
    changes = {
        name: getattr(opened.cfg, name).model_copy(update=new) for name, new in (("data", data), ("training", training))
    }
    cfg = opened.cfg.model_copy(update=changes)
    dataset = KDDataset(manifest, "valid", seq_length=cfg.data.seq_length)
    # A row holds at least one conversation, so so many global batches hold them all.
    whole = -(-len(dataset) // cfg.training.global_batch_size)
    cfg = cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update={"eval_iters": whole})})
    objective = build_objective(cfg)
    check_kinds(objective, cfg, [manifest])
    metrics = evaluate(
        opened.model, objective, ValidSource(Part("valid", dataset), cfg, 0, 1, objective.needs.annotations)
    )
    # How spans are weighted in the total is the run's affair; of other models nobody knows it.
    unknown = () if imitates or cfg.training.objective == "token_ce" else ("loss/total",)
    return {tag: value for tag, value in metrics.items() if tag.startswith("loss/") and tag not in unknown}


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
