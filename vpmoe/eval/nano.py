"""Evaluate a small run on questions whose answers can be checked: losses, Harmony validity, exact answers.

vpmoe eval nano runs/quickstart --questions data/synth_mini/test.jsonl
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.tasks.synth_mini import check
from vpmoe.eval.checkpoints import TrainedRun, open_trained, require_folder
from vpmoe.eval.display import spell
from vpmoe.eval.plots import plot_run, read_curves
from vpmoe.eval.questions import Question, context_messages, prompt_ids, read_questions
from vpmoe.eval.reports import write_report
from vpmoe.eval.scoring import Scored, score, summarize
from vpmoe.harmony.parse import Parser

if TYPE_CHECKING:
    from megatron_vpmoe.generation.sampler import SamplingOptions
    from megatron_vpmoe.model.gpt import VPModel
    from vpmoe.tokenizer import Tokenizer

SCHEMA_VERSION = 1
KIND = "nano_evaluation"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class NanoOptions:
    """What to evaluate with.

    Attributes:
        questions: JSONL of rows with answers.
        conversations: folder of the conversations behind the dataset; gives the system and developer messages.
        data_path: the built dataset; None takes the run's own.
        per_family: questions of each family; None takes all.
        max_new_tokens: cut a generation after so many tokens; a cut one is not valid.
        batch_size: prompts decoded together.
        samples: decoded generations kept in the report, the same number of each family as far as it goes.
    """

    questions: Path
    conversations: Path
    data_path: Path | None = None
    per_family: int | None = None
    max_new_tokens: int = 256
    batch_size: int = 64
    samples: int = 8

    def __post_init__(self) -> None:
        for name in ("per_family", "max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} is {value}", source=f"--{name.replace('_', '-')}", remedy="use at least 1")


def evaluate_and_plot(path: Path, options: NanoOptions, output: Path | None, *, progress: Progress) -> dict[str, Any]:
    """Evaluate the run at ``path``; write the report, the picture beside it (``.png``), and print a summary.

    Args:
        path: run directory or checkpoint, as :func:`vpmoe.eval.checkpoints.open_trained` takes it.
        output: the report; None is ``evaluation.json`` in the run's directory.
        progress: takes a line about what is going on.

    Raises:
        CheckpointError, DataError, TokenizerError: something named does not exist or does not fit the rest.
    """
    report, run_directory = evaluate_run(path, options, progress=progress)
    output = run_directory / "evaluation.json" if output is None else output
    curves = read_curves(run_directory / "metrics.jsonl")
    picture = output.with_suffix(".png")
    plot_run(
        curves,
        report["generations"],
        picture,
        title=f"{report['checkpoint']['run']}, step {report['checkpoint']['iteration']}",
    )
    # The report comes last: where there is one, there is its picture.
    write_report(output, report)
    print(summary_lines(report))
    print(f"{output} and {picture.name} written")
    return report


def evaluate_run(path: Path, options: NanoOptions, *, progress: Progress) -> tuple[dict[str, Any], Path]:
    """The report on the run at ``path``, and the run's directory.

    Args:
        path: as above.
        progress: as above.

    Raises:
        CheckpointError, DataError, TokenizerError: something named does not exist or does not fit the rest.
    """
    require_folder(path)
    questions = read_questions(options.questions, per_family=options.per_family)
    started = time.perf_counter()
    with open_trained(path, data_path=options.data_path) as run:
        context = context_messages(options.conversations, run.dataset.root)
        loaded = time.perf_counter()
        losses = valid_losses(run)
        measured = time.perf_counter()
        progress(f"losses on the valid split: {_spelled(losses)}")
        scored = answer(run.model, run.tokenizer, context, questions, options, progress=progress)
        finished = time.perf_counter()
        report = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "checkpoint": _checkpoint_entry(run),
            "config_hash": run.config_hash,
            "dataset": {"path": str(run.dataset.root), "manifest_sha256": run.dataset.sha256},
            "questions": {"path": str(options.questions), "sha256": sha256_of_file(options.questions)},
            "options": _options_entry(options),
            "losses": losses,
            "generations": summarize(scored),
            "seconds": {
                "load": round(loaded - started, 2),
                "losses": round(measured - loaded, 2),
                "generation": round(finished - measured, 2),
            },
            "samples": [_sample(item, run.tokenizer) for item in _spread(scored, options.samples)],
        }
    return report, run.run_directory


def summary_lines(report: dict[str, Any]) -> str:
    """The report's numbers as a few lines."""
    generations = report["generations"]
    lines = [
        f"loss/{name:<12}{report['losses'][f'loss/{name}']:8.4f} nats per token, whole valid split"
        for name in ("analysis", "final", "total")
    ]
    families = {**generations["families"], "all": generations}
    for name, entry in families.items():
        lines.append(
            f"{name:<24}{entry['exact']:>5} of {entry['n']:<5}exact ({100 * entry['accuracy']:5.1f} %), "
            f"valid Harmony {100 * entry['validity']:5.1f} %"
        )
    if generations["faults"]:
        lines.append("faults: " + ", ".join(f"{reason} {count}" for reason, count in generations["faults"].items()))
    return "\n".join(lines)


def valid_losses(run: TrainedRun) -> dict[str, float]:
    """The objective's ``loss/*`` over the whole valid split, each a mean over all its supervised tokens, in nats."""
    from megatron_vpmoe.data.blend import Part
    from megatron_vpmoe.data.kd_dataset import KDDataset
    from megatron_vpmoe.data.source import ValidSource
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.training.evaluate import evaluate

    cfg = run.cfg
    dataset = KDDataset(run.dataset, "valid", seq_length=cfg.data.seq_length)
    # A row holds at least one conversation, so so many global batches hold them all.
    whole = -(-len(dataset) // cfg.training.global_batch_size)
    cfg = cfg.model_copy(update={"evaluation": cfg.evaluation.model_copy(update={"eval_iters": whole})})
    metrics = evaluate(run.model, build_objective(cfg), ValidSource(Part("valid", dataset), cfg, 0, 1))
    return {tag: value for tag, value in metrics.items() if tag.startswith("loss/")}


def answer(
    model: VPModel,
    tokenizer: Tokenizer,
    context: Sequence[Any],
    questions: Sequence[Question],
    options: NanoOptions,
    *,
    progress: Progress,
) -> list[Scored]:
    """Ask every question greedily, in batches of prompts of like length, and judge the generations; order kept."""
    from megatron_vpmoe.generation.sampler import SamplingOptions

    prompts = prompt_ids(tokenizer, context, [question.query for question in questions])
    sampling = SamplingOptions(options.max_new_tokens, stop_ids(tokenizer))
    completions = decode_in_batches(model, prompts, sampling, options.batch_size, progress=progress)
    return score(questions, completions, Parser(tokenizer), check)


def stop_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end a generation: the end of the answer, a tool call, the end of a document."""
    return (tokenizer.special_id("<|return|>"), tokenizer.special_id("<|call|>"), tokenizer.eod_id)


def decode_in_batches(
    model: VPModel,
    prompts: Sequence[Sequence[int]],
    sampling: SamplingOptions,
    batch_size: int,
    *,
    progress: Progress,
) -> list[list[int]]:
    """New tokens of each prompt, in the order of the prompts; prompts of like length are decoded together."""
    from megatron_vpmoe.generation.sampler import generate

    by_length = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
    completions: list[list[int]] = [[] for _ in prompts]
    for begin in range(0, len(by_length), batch_size):
        places = by_length[begin : begin + batch_size]
        for place, ids in zip(places, generate(model, [prompts[p] for p in places], sampling), strict=True):
            completions[place] = ids
        progress(f"answered {begin + len(places)} of {len(prompts)} questions")
    return completions


def _checkpoint_entry(run: TrainedRun) -> dict[str, Any]:
    return {
        "run": run.cfg.training.run_name,
        "name": run.found.path.name,
        "iteration": run.found.iteration,
        "files_sha256": run.files_sha256,
    }


def _options_entry(options: NanoOptions) -> dict[str, Any]:
    """The options that decide what is in the report."""
    return {name: getattr(options, name) for name in ("per_family", "max_new_tokens", "samples")}


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
