"""Suites that every rung is asked: the same items, at the same context, whatever a rung's vocabulary.

Where a model says nothing else, a suite takes the context that a model was trained at. Here it is one for all rungs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_vpmoe.config.schema_evaluation import AskedSuite
from megatron_vpmoe.files import sha256_of_json
from megatron_vpmoe.manifest import Manifest
from vpmoe.errors import UpcycleError
from vpmoe.eval.reports import read_report
from vpmoe.eval.suites import canaries, core8, text
from vpmoe.eval.suites.fetch import bundle_folder
from vpmoe.eval.suites.in_training import told
from vpmoe.eval.suites.pinned import Outputs, difference
from vpmoe.eval.suites.suite_options import CanaryOptions, Core8Options, TextOptions
from vpmoe.eval.suites.suite_report import KIND
from vpmoe.upcycle.ladder_file import Evaluation

Say = Callable[[str], None]
CONTEXT = 2048
"""Tokens, where a suite's options do not say others."""


@dataclass(frozen=True)
class RungSuite:
    """A suite, read.

    Attributes:
        label: what the report calls it.
        decides: hashes of what is asked and what else decides the numbers, for a step's key.
        evaluate: asks an object, writes the suite's report, and returns it; the last is whether to be quiet.
    """

    label: str
    decides: dict[str, Any]
    evaluate: Callable[[Path, Path, bool], dict[str, Any]]

    def ask(self, folder: Path, output: Path, quiet: bool) -> dict[str, Any]:
        """Ask one object.

        Returns:
            ``number``, the name of what the suite is known by, its ``value``, all ``numbers`` of the tasks, and the
            ``form`` in which it asks, None where there is one only.

        Raises:
            CheckpointError, TokenizerError: no weights or vocabulary there.
        """
        report = self.evaluate(folder, output, quiet)
        number, value = headline(report)
        form = report.get("asked", {}).get("form")
        return {"number": number, "value": value, "numbers": told(report["tasks"]), "form": form}


def headline(report: Mapping[str, Any]) -> tuple[str, float]:
    """The one number that a report is known by: its mean, else that of all items, or of its first task."""
    means = {name: value for name, value in report.items() if isinstance(value, float) and name != "wall_seconds"}
    tasks = report["tasks"]
    entry = tasks.get("all") or next(iter(tasks.values()))
    numbers = {
        name: entry[name] for name in ("bits_per_byte", "accuracy", *entry) if isinstance(entry.get(name), float)
    }
    return next(iter((means or numbers).items()))


def check_suites(settings: Evaluation, *, source: str) -> None:
    """Refuse suites that there are not, and two of one name; raises :class:`UpcycleError`."""
    for part in settings.suites:
        if part.suite not in _SUITES:
            raise UpcycleError(
                f"there is no suite {part.suite!r} for a ladder",
                source=f"{source}: evaluation.suites",
                remedy=f"choose among {', '.join(_SUITES)}",
            )
    if twice := [name for name, count in Counter(part.label for part in settings.suites).items() if count > 1]:
        raise UpcycleError(
            f"two suites are called {twice[0]}", source=f"{source}: evaluation.suites", remedy="give one a name"
        )


def read_suites(settings: Evaluation, say: Say | None) -> list[RungSuite]:
    """Every suite of the ladder, with what it asks.

    Args:
        settings: of the ladder.
        say: told that a bundle is fetched; None: it has to be there.

    Raises:
        ConfigError: options that a suite does not take.
        DataError: what it asks is not there.
    """
    return [_SUITES[part.suite](part, settings, say) for part in settings.suites]


def _core8(part: AskedSuite, settings: Evaluation, say: Say | None) -> RungSuite:
    options = Core8Options.of(part.options, f"evaluation.suites: {part.label}")
    own = core8.Settings.read(options.config)
    chosen = core8.Chosen(
        tasks=options.tasks or own.tasks,
        bundle=options.bundle or bundle_folder(own.bundle, say=say),
        batch_size=options.batch_size,
        context=options.context or CONTEXT,
        bf16=settings.precision == "bfloat16",
        overwrite=True,
        items=part.items,
    )
    assert chosen.bundle is not None
    items = core8.Items.read(chosen.bundle, chosen.tasks, chosen.limit(own), own)
    decides = {
        "files": items.files,
        "items": chosen.limit(own),
        "seeds": [own.seed, own.shot_seed],
        "context": chosen.context,
        "precision": settings.precision,
    }

    def evaluate(folder: Path, output: Path, quiet: bool) -> dict[str, Any]:
        return core8.evaluate(folder, own, replace(chosen, output=output, quiet=quiet), say=lambda line: None)

    return RungSuite(part.label, decides, evaluate)


def _text(part: AskedSuite, settings: Evaluation, say: Say | None) -> RungSuite:
    options = TextOptions.of(part.options, f"evaluation.suites: {part.label}")
    asked = replace(
        options.asked(part.items),
        window=options.window or CONTEXT,
        bf16=settings.precision == "bfloat16",
        overwrite=True,
    )
    measured = text.read(asked)
    of_dataset = isinstance(measured, Manifest)
    decides = {
        "read": [measured.sha256, asked.split, asked.documents] if of_dataset else sha256_of_json(measured),
        "windows": None if of_dataset else [asked.window, asked.stride],
        "precision": settings.precision,
    }

    def evaluate(folder: Path, output: Path, quiet: bool) -> dict[str, Any]:
        return text.evaluate(folder, replace(asked, output=output, quiet=quiet), say=lambda line: None)

    return RungSuite(part.label, decides, evaluate)


def _canaries(part: AskedSuite, settings: Evaluation, say: Say | None) -> RungSuite:
    source = f"evaluation.suites: {part.label}"
    options = CanaryOptions.of(part.options, source)
    chosen = replace(
        options.for_any_form(part.items, source),
        context=options.context or CONTEXT,
        bf16=settings.precision == "bfloat16",
        overwrite=True,
    )
    own, tasks = canaries.Settings.read(options.config), canaries.known(chosen)
    decides = {
        "settings": own.model_copy(update=chosen.instead).model_dump(exclude={"items", "batch_size"}),
        "items": chosen.limit(own),
        "tasks": [*tasks],
        "plain": chosen.plain,
        "context": chosen.context,
        "precision": settings.precision,
    }

    def evaluate(folder: Path, output: Path, quiet: bool) -> dict[str, Any]:
        return canaries.evaluate(folder, own, replace(chosen, output=output, quiet=quiet), say=lambda line: None)

    return RungSuite(part.label, decides, evaluate)


def pinned_changes(report: Path, former: Path | None) -> dict[str, Any] | None:
    """Where the pinned answers of a suite's report part from those of the object below; None: one has none."""
    if former is None or not all(read_report(path, KIND).get("pinned") for path in (report, former)):
        return None
    return difference(Outputs.read(report), Outputs.read(former))


_SUITES: dict[str, Callable[[AskedSuite, Evaluation, Say | None], RungSuite]] = {
    "core8": _core8,
    "text": _text,
    "canaries": _canaries,
}
