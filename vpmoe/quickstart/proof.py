"""What the proofs of this room share: trainings of several seeds, and a report held against targets."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Self

from megatron_vpmoe.config import config_hash, load_config
from megatron_vpmoe.files import write_atomically
from megatron_vpmoe.software import provenance
from vpmoe.eval.plots import Curves
from vpmoe.eval.reports import check_reportable, read_report, write_report
from vpmoe.eval.suites.suite_report import ALL
from vpmoe.eval.suites.suite_report import KIND as EVALUATION_KIND
from vpmoe.quickstart.plan import SETTINGS as QUICKSTART
from vpmoe.quickstart.plan import Plan
from vpmoe.quickstart.runner import PREPARING, Runner, say
from vpmoe.quickstart.settings import ProofSchema, QuickstartError, Schema, Stage, read_settings
from vpmoe.quickstart.trained import QuestionedRun, TrainedRun, flags

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Proof(Generic[Schema]):
    """What is asked for.

    Attributes:
        name: of the report, the folders of data and reports, and the runs, such as ``rl_nano``.
        does: what each step does, by its name, in their order.
        root: the checkout; configurations are found here.
        work: data/, runs/ and reports/ go here.
        settings: of its settings file.
        seeds: of the trainings.
        force: steps to do again.
        overwrite: replace what was made of other settings, code or data.
        exempt: why the targets do not bind; None: they do.
    """

    name: str
    does: Mapping[str, str]
    root: Path
    work: Path
    settings: Schema
    seeds: tuple[int, ...]
    force: tuple[str, ...]
    overwrite: bool
    exempt: str | None

    def __post_init__(self) -> None:
        known = tuple(self.does)[1:]  # the first only looks
        if unknown := [step for step in self.force if step not in known]:
            raise QuickstartError(
                f"there is no step {', '.join(unknown)}", source="--force", remedy=f"use one of {', '.join(known)}"
            )
        if len(set(self.seeds)) < len(self.seeds):
            raise QuickstartError(f"seeds {list(self.seeds)}", source="--seed", remedy="name each once")

    def training(self, part: str, seed: int, stage: Stage, *more: str, **changes: float) -> TrainedRun:
        """A training of a seed: its stage's configuration and overrides, these changed, and ``more`` flags."""
        name = f"{self.name}_{part}_{seed}"
        seeds = ("--seed", str(seed), "--data-seed", str(seed))
        overrides = ("--run-name", name, *seeds, *flags({**stage.overrides, **changes}), *more)
        cfg = load_config(os.path.relpath(self.root / stage.config), [*overrides])
        return TrainedRun(self.root, self.work, stage.config, overrides, cfg)

    @property
    def report_file(self) -> Path:
        """Its report; table and picture lie beside it."""
        return self.work / "reports" / self.name / "report.json"

    def runner(self) -> Runner:
        """What does its steps, of which the first, a look at the environment, is done.

        Raises:
            NotOursError: something else lies where the report belongs.
        """
        check_reportable(self.report_file, self.name)
        runner = Runner(self.does, self.work, force=self.force, overwrite=self.overwrite)
        verb = self.name.replace("_", "-")
        say(f"vpMoE {verb} in {self.work}: {len(self.does)} steps; what is done and valid is skipped")
        runner.look(self.root)
        return runner

    def report(
        self,
        runs: Mapping[str, TrainedRun],
        seconds: Mapping[str, float],
        found: Mapping[str, Any],
        lines: str,
        draw: Callable[[Path], None],
        told: Mapping[str, Mapping[str, Any]] | None = None,
    ) -> dict[str, Any]:
        """Write ``report.json``, ``report.md`` and ``report.png`` to ``reports/<name>``, print the table.

        Args:
            runs: of one seed, by part.
            seconds: spent on what was made, by name, over all seeds.
            found: the results.
            lines: the table.
            draw: writes the picture.
            told: where runs come from, by part; None: what the evaluations of those say that have one.
        """
        evaluated = {part: run for part, run in runs.items() if (run.work / run.evaluation).is_file()}
        trained = told or {part: evaluation(run)["provenance"] for part, run in evaluated.items()}
        report = {
            "schema_version": SCHEMA_VERSION,
            "kind": self.name,
            "settings": self.settings.model_dump(),
            "provenance": provenance(
                config_hash={part: config_hash(run.cfg) for part, run in runs.items()},
                tokenizer=next(iter(trained.values()))["tokenizer"],
                dataset={part: told["dataset_manifest_sha256"] for part, told in trained.items()},
            ),
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
            **found,
        }
        path = self.report_file
        check_reportable(path, self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        draw(path.with_suffix(".png"))
        write_atomically(path.with_suffix(".md"), (lines + "\n").encode())
        # The report comes last: where there is one, there are the others.
        write_report(path, report)
        print(f"\n{lines}\n\nreport: {path}, table and picture beside it", flush=True)
        return report


@dataclass(frozen=True)
class QuestionProof(Proof[ProofSchema]):
    """One whose runs answer the quickstart's held-out questions; its settings are ``configs/nano/<name>.toml``.

    Attributes:
        data: whose dataset and questions are used.
    """

    data: Plan

    @classmethod
    def of(
        cls,
        root: Path,
        name: str,
        schema: type[ProofSchema],
        does: Mapping[str, str],
        *,
        seeds: Sequence[int] = (),
        force: Sequence[str] = (),
        overwrite: bool = False,
        work_dir: Path | None = None,
        settings: Path | None = None,
    ) -> Self:
        """What the command line asks for in the checkout ``root``; no seeds: the configuration's.

        Args:
            does: of the steps behind the data.

        Raises:
            QuickstartError: an unknown step to force, a seed twice, or unusable settings.
            ConfigError: a training configuration that cannot be.
        """
        read = read_settings(settings or root / "configs" / "nano" / f"{name}.toml", schema)
        quickstart = read_settings(root / QUICKSTART)
        asked = quickstart.evaluation.model_copy(update={"per_family": read.per_family})
        data_of = {"rows": quickstart.rows | read.rows, "dataset": quickstart.dataset | read.dataset}
        own = quickstart.model_copy(update={**data_of, "evaluation": asked})
        data = Plan.of(root, overwrite=overwrite, work_dir=work_dir, settings=own, data=Path("data") / name)
        return cls(
            name=name,
            does={**PREPARING, **does},
            root=root,
            work=data.work,
            settings=read,
            seeds=tuple(seeds) or (data.cfg.training.seed,),
            force=tuple(force),
            overwrite=overwrite,
            exempt=f"--settings {settings}" if settings else None,
            data=data,
        )

    def run(self, part: str, seed: int, stage: Stage, *more: str, **changes: float) -> QuestionedRun:
        """A training that answers the questions; see :meth:`training`."""
        trained = self.training(part, seed, stage, *more, **changes)
        return QuestionedRun(**vars(trained), asked=self.data.asked, data=self.data.data)

    def begin(self) -> Runner:
        """The runner of its steps, with the data made."""
        runner = self.runner()
        runner.prepare(self.data)
        return runner


def answers(run: TrainedRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a run's evaluation says of all held-out questions, and of each family's."""
    tasks = dict(evaluation(run)["tasks"])
    return tasks.pop(ALL), tasks


def evaluation(run: TrainedRun) -> dict[str, Any]:
    """The report of a run's evaluation."""
    return read_report(run.work / run.evaluation, EVALUATION_KIND)


def curve(axes: Axes, curves: Curves, tag: str, label: str, **style: Any) -> None:
    """Draw a tag of a run's metrics, where it has it."""
    if points := curves.get(tag):
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, **style)


def percent(share: float) -> str:
    """As tables have it."""
    return f"{100 * share:.1f} %"
