"""What ``vpmoe rl-nano`` and ``vpmoe distil-nano`` share: trainings of several seeds, a report held against targets."""

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
from vpmoe.quickstart.settings import ProofSchema, QuickstartError, Stage, read_settings
from vpmoe.quickstart.trained import TrainedRun, flags

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA_VERSION = 2


@dataclass(frozen=True)
class Proof(Generic[ProofSchema]):
    """What is asked for.

    Attributes:
        name: of the settings file, the folders of data and reports, the runs and the report, such as ``rl_nano``.
        does: what each step does, by its name, in their order.
        data: whose dataset and questions are used.
        settings: of ``configs/nano/<name>.toml``.
        seeds: of the trainings.
        force: steps to do again.
        exempt: why the targets do not bind; None: they do.
    """

    name: str
    does: Mapping[str, str]
    data: Plan
    settings: ProofSchema
    seeds: tuple[int, ...]
    force: tuple[str, ...]
    exempt: str | None

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
        steps = {**PREPARING, **does}
        known = tuple(steps)[1:]
        if unknown := [step for step in force if step not in known]:
            raise QuickstartError(
                f"there is no step {', '.join(unknown)}", source="--force", remedy=f"use one of {', '.join(known)}"
            )
        if len(set(seeds)) < len(seeds):
            raise QuickstartError(f"seeds {list(seeds)}", source="--seed", remedy="name each once")
        read = read_settings(settings or root / "configs" / "nano" / f"{name}.toml", schema)
        quickstart = read_settings(root / QUICKSTART)
        asked = quickstart.evaluation.model_copy(update={"per_family": read.per_family})
        data_of = {"rows": quickstart.rows | read.rows, "dataset": quickstart.dataset | read.dataset}
        own = quickstart.model_copy(update={**data_of, "evaluation": asked})
        data = Plan.of(root, overwrite=overwrite, work_dir=work_dir, settings=own, data=Path("data") / name)
        chosen = tuple(seeds) or (data.cfg.training.seed,)
        return cls(name, steps, data, read, chosen, tuple(force), f"--settings {settings}" if settings else None)

    def run(self, part: str, seed: int, stage: Stage, *more: str, **changes: float) -> TrainedRun:
        """A training of a seed: its stage's configuration and overrides, these changed, and ``more`` flags."""
        name = f"{self.name}_{part}_{seed}"
        seeds = ("--seed", str(seed), "--data-seed", str(seed))
        overrides = ("--run-name", name, *seeds, *flags({**stage.overrides, **changes}), *more)
        data = self.data
        cfg = load_config(os.path.relpath(data.root / stage.config), [*overrides])
        return TrainedRun(data.root, data.work, stage.config, overrides, cfg, data.asked, data.data)

    def begin(self) -> Runner:
        """The runner of its steps, with the data made."""
        runner = Runner(self.does, self.data.work, force=self.force, overwrite=self.data.overwrite)
        verb = self.name.replace("_", "-")
        say(f"vpMoE {verb} in {self.data.work}: {len(self.does)} steps; what is done and valid is skipped")
        runner.prepare(self.data)
        return runner

    def report(
        self,
        runs: Mapping[str, TrainedRun],
        seconds: Mapping[str, float],
        found: Mapping[str, Any],
        lines: str,
        draw: Callable[[Path], None],
    ) -> dict[str, Any]:
        """Write ``report.json``, ``report.md`` and ``report.png`` to ``reports/<name>``, print the table.

        Args:
            runs: of one seed, by part.
            seconds: spent on what was made, by name, over all seeds.
            found: the results.
            lines: the table.
            draw: writes the picture.
        """
        evaluated = {part: run for part, run in runs.items() if (run.work / run.evaluation).is_file()}
        trained = {part: evaluation(run)["provenance"] for part, run in evaluated.items()}
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
        folder = self.data.work / "reports" / self.name
        check_reportable(folder / "report.json", self.name)
        folder.mkdir(parents=True, exist_ok=True)
        draw(folder / "report.png")
        write_atomically(folder / "report.md", (lines + "\n").encode())
        # The report comes last: where there is one, there are the others.
        write_report(folder / "report.json", report)
        print(f"\n{lines}\n\nreport: {folder / 'report.json'}, table and picture beside it", flush=True)
        return report


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
