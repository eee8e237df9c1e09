"""CORE-8, and any other task of the CORE bundle, by the rules of CORE.

A multiple choice is decided by the mean log-likelihood of each option's tokens, a schema by that of what its contexts
have in common at the end, language modelling by whether greedy decoding would give the whole continuation. Accuracy is
centered so that chance is 0 and perfection 1.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from megatron_vpmoe.files import sha256_of_file
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.signals import StopRequest
from vpmoe.eval.open_model import Opened, open_model, require_folder
from vpmoe.eval.suites import suite_report
from vpmoe.eval.suites.bundle import Bundle, Item, Task, drawn, examples
from vpmoe.eval.suites.fetch import Published, bundle_folder
from vpmoe.eval.suites.likelihoods import Likelihood, likelihoods
from vpmoe.eval.suites.prompts import Asked, ask
from vpmoe.eval.suites.suite_settings import ALL, SizedSettings
from vpmoe.progress import Progress
from vpmoe.weights.geometry import process_groups

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel
    from vpmoe.tokenizer import Tokenizer

SUITE = "core8"
Say = Callable[[str], None]


class Settings(SizedSettings):
    """The file of the suite; items are those of each task."""

    tasks: tuple[str, ...] = Field(min_length=1)
    seed: int
    shot_seed: int
    bundle: Published


@dataclass(frozen=True)
class Chosen:
    """What the command line chooses.

    Attributes:
        size: of the settings' sizes, or "all".
        items: of each task, whatever the size; None: as the size says.
        tasks: instead of the settings'; empty: those; "all": every one of the bundle.
        bundle: a folder instead of the published bundle.
        batch_size: instead of the settings'.
        context: tokens that a sequence is cut to; None: as the model was trained.
        bf16: compute in bfloat16 or not; None: as the run did.
        output: the report; None: ``reports/eval/core8/<checkpoint>.json``.
        overwrite: replace a finished report.
        quiet: no progress bars.
    """

    size: str = "smoke"
    tasks: tuple[str, ...] = ()
    bundle: Path | None = None
    batch_size: int | None = None
    context: int | None = None
    bf16: bool | None = None
    output: Path | None = None
    overwrite: bool = False
    items: int | None = None
    quiet: bool = False

    def limit(self, settings: Settings) -> int | None:
        """Items of each task; None: all."""
        return settings.limit(self.size) if self.items is None else self.items


@dataclass(frozen=True)
class Items:
    """What is asked, read once, of any number of models.

    Attributes:
        bundle: that it is of.
        of_task: the items of each task, each with its place in the file.
        shot_seed: of the draw of the examples.
    """

    bundle: Bundle
    of_task: dict[str, list[tuple[int, Item]]]
    shot_seed: int

    @classmethod
    def read(cls, folder: Path, tasks: Sequence[str], limit: int | None, settings: Settings) -> Items:
        """The first ``limit`` items of each task in the order of the settings' seed; "all": every task of the bundle.

        Raises:
            DataError: no bundle, no such task, or not its items.
        """
        bundle = Bundle(folder)
        names = bundle.tasks if tuple(tasks) == (ALL,) else dict.fromkeys(tasks)
        of_task = {name: drawn(bundle.read(name), limit, settings.seed) for name in names}
        return cls(bundle, of_task, settings.shot_seed)

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """The file of each task, its sha256, and what the bundle says of how it is asked and scored."""
        return {
            name: {
                "file": task.uri,
                "sha256": sha256_of_file(self.bundle.file_of(name)),
                **task.model_dump(include={"kind", "delimiter", "chance"}),
                "shots": task.shots[0],
            }
            for name, task in ((name, self.bundle.tasks[name]) for name in self.of_task)
        }

    def asked(self, name: str, tokenizer: Tokenizer, context: int | None) -> list[Asked]:
        """The items of a task as token ids; raises :class:`TokenizerError` where the vocabulary lacks them."""
        items = [item for _, item in self.of_task[name]]
        return ask_all(self.bundle.tasks[name], items, tokenizer, context, self.shot_seed)

    def score(
        self,
        model: VPModel,
        name: str,
        asked: Sequence[Asked],
        rows: int,
        *,
        quiet: bool = False,
        stop: StopRequest | None = None,
    ) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """A task's numbers, and a record an item; a collective."""
        judged = score(model, asked, rows, None if quiet else name, stop)
        records = [
            {"task": name, "item": place, **record}
            for (place, _), record in zip(self.of_task[name], judged, strict=True)
        ]
        return entry_of(self.bundle.tasks[name], records), records


def evaluate(path: Path, settings: Settings, chosen: Chosen, *, say: Say) -> dict[str, Any]:
    """Evaluate the model at ``path``, write report and items, and return the report; a collective of all ranks.

    Args:
        path: as :func:`vpmoe.eval.open_model.open_model` takes it.
        settings: of the suite.
        chosen: of the command line.
        say: takes a line about what is going on.

    Raises:
        CheckpointError, DataError, TokenizerError, ConfigError: something named does not exist or does not fit.
        NotOursError: something else lies where the report belongs.
    """
    started = time.perf_counter()
    require_folder(path)
    limit = chosen.limit(settings)
    with contextlib.ExitStack() as stack:
        stack.enter_context(process_groups())  # processes that torchrun has started wait for the first one's fetching
        folder = chosen.bundle or distributed.from_rank_0(lambda: bundle_folder(settings.bundle, say=say))
        items = Items.read(folder, chosen.tasks or settings.tasks, limit, settings)
        opened = stack.enter_context(open_model(path, bf16=chosen.bf16))
        output = suite_report.output_for(SUITE, opened, chosen.output, overwrite=chosen.overwrite)
        context = chosen.context or opened.context
        rows = chosen.batch_size or settings.batch_size
        entries: dict[str, dict[str, Any]] = {}
        records: list[dict[str, Any]] = []
        for name in items.of_task:
            began = time.perf_counter()
            asked = items.asked(name, opened.tokenizer, context)
            entry, found = items.score(opened.model, name, asked, rows, quiet=chosen.quiet)
            records += found
            entries[name] = {**entry, "seconds": round(time.perf_counter() - began, 2)}
        report = {
            **suite_report.head(SUITE, opened, _settings_entry(settings, chosen, context, opened)),
            "bundle": items.files,
            "tasks": entries,
            **suite_report.means(
                {"core8_centered_mean": settings.tasks, "centered_mean": tuple(items.of_task)}, entries, records
            ),
            "wall_seconds": round(time.perf_counter() - started, 2),
        }
        suite_report.write(output, report, records)
    say(f"{output} written")
    return report


def ask_all(
    task: Task, items: Sequence[Item], tokenizer: Tokenizer, context: int | None, shot_seed: int
) -> list[Asked]:
    """The items of a task as token ids; each item's examples are drawn among the others."""
    return [
        ask(task, item, examples(items, place, task.shots[0], shot_seed), tokenizer, context)
        for place, item in enumerate(items)
    ]


def score(
    model: VPModel, asked: Sequence[Asked], rows: int, label: str | None, stop: StopRequest | None = None
) -> list[dict[str, Any]]:
    """Of each item what was chosen, whether that is right, and the likelihoods that decided; ``label``: of a bar."""
    from megatron.core import parallel_state

    requests = [request for one in asked for request in one.requests]
    mine = -(-len(requests) // parallel_state.get_data_parallel_world_size())
    quiet = label is None or distributed.rank() != 0
    with Progress(label or "", mine, unit="continuations", quiet=quiet) as progress:
        scored = iter(likelihoods(model, requests, rows=rows, watch=lambda _: progress.add(1), stop=stop))
    return [_judged(one, [next(scored) for _ in one.requests]) for one in asked]


def _judged(asked: Asked, options: Sequence[Likelihood]) -> dict[str, Any]:
    means = [option.mean for option in options]
    chosen = None if asked.gold is None else means.index(max(means))
    return {
        "gold": asked.gold,
        "chosen": chosen,
        "correct": options[0].greedy if asked.gold is None else chosen == asked.gold,
        "log_likelihoods": means,
        "tokens": [option.tokens for option in options],
        "cut": asked.cut,
    }


def entry_of(task: Task, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """A task's numbers: accuracy, centered, n, their 95 % intervals, and how many items were cut."""
    return {
        **suite_report.shares(sum(record["correct"] for record in records), len(records), task.chance),
        "chance": task.chance,
        "kind": task.kind,
        "shots": task.shots[0],
        "cut": sum(record["cut"] for record in records),
    }


def line_of(name: str, entry: Mapping[str, Any]) -> str:
    """A task's numbers for a person."""
    low, high = entry["interval"]
    cut = f", {entry['cut']} cut to the context" if entry["cut"] else ""
    numbers = f"{entry['accuracy']:.4f} [{low:.3f}, {high:.3f}], centered {entry['centered']:+.4f}"
    return f"{name:<24}{numbers}, n {entry['n']}, {entry['seconds']:.1f} s{cut}"


def summary_lines(report: Mapping[str, Any]) -> str:
    """The report as a few lines."""
    lines = [line_of(name, entry) for name, entry in report["tasks"].items()]
    name, mean = next(iter(report["means"].items()))
    bounds = "" if mean["interval"] is None else " [{:.3f}, {:.3f}]".format(*mean["interval"])
    numbers = f"{mean['value']:.4f}{bounds}"
    return "\n".join([*lines, f"{name:<24}{numbers} of {report['checkpoint']['run']}, {report['wall_seconds']:.1f} s"])


def _settings_entry(settings: Settings, chosen: Chosen, context: int | None, opened: Opened) -> dict[str, Any]:
    return {
        "items": chosen.limit(settings),
        "seed": settings.seed,
        "shot_seed": settings.shot_seed,
        "context": context,
        "bf16": opened.cfg.training.bf16,
        "batch_size": chosen.batch_size or settings.batch_size,
    }
