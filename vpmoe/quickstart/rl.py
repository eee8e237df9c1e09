"""``vpmoe rl-nano``: a model short of mastery, and what rewards (GRPO) and preferences (DPO) make of its weights."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vpmoe.config import load_config
from vpmoe.commands import Command
from vpmoe.eval.pairs import PAIRS_NAME
from vpmoe.quickstart.plan import SETTINGS as QUICKSTART
from vpmoe.quickstart.plan import Plan
from vpmoe.quickstart.run import verdict
from vpmoe.quickstart.runner import PREPARING, Runner, say
from vpmoe.quickstart.settings import QuickstartError, RlSettings, Stage, read_settings
from vpmoe.quickstart.trained import TrainedRun, flags
from vpmoe.steps import Step

SETTINGS = Path("configs/nano/rl_nano.toml")
DATA = Path("data/rl_nano")
_DOES = {
    **PREPARING,
    "sft": "trains a nano vpMoE short of mastery, and evaluates it",
    "grpo": "goes on from it with rewards for exact answers, and evaluates that",
    "pairs": "asks it questions; its wrong answers against the right ones are preference pairs",
    "dpo": "goes on from it with those, and evaluates that",
}
_FORCED = tuple(_DOES)[1:]


@dataclass(frozen=True)
class SeedPlan:
    """The runs of one seed.

    Attributes:
        answers: folder of the pairs as rows.
        settings: for ``vpmoe eval pairs``.
    """

    seed: int
    sft: TrainedRun
    grpo: TrainedRun
    dpo: TrainedRun
    answers: Path
    data: Plan
    settings: RlSettings

    @classmethod
    def of(cls, data: Plan, settings: RlSettings, seed: int) -> SeedPlan:
        """The three runs and the pairs, all of this seed."""

        def run(part: str, stage: Stage, *more: str) -> TrainedRun:
            name = f"rl_nano_{part}_{seed}"
            overrides = ("--run-name", name, "--seed", str(seed), "--data-seed", str(seed), *more)
            cfg = load_config(os.path.relpath(data.root / stage.config), [*overrides])
            return TrainedRun(data.root, data.work, stage.config, overrides, cfg, data.asked, data.data)

        place = ("--data-path", str(data.dataset))
        sft = run("sft", settings.sft, *place)
        start, pairs = str(sft.run), str(DATA / f"pairs_{seed}")
        return cls(
            seed,
            sft,
            run("grpo", settings.grpo, *place, "--rollout-seed", str(seed), "--load-weights", start),
            run("dpo", settings.dpo, "--data-path", pairs, "--load-weights", start, "--reference-weights", start),
            DATA / f"answers_{seed}",
            data,
            settings,
        )

    def pairs(self) -> list[tuple[Step, Command]]:
        """The commands that make the preference dataset, in their order; the steps are theirs."""
        dataset = self.sft.dataset
        split = {"valid_fraction": self.data.settings.dataset["valid_fraction"]}
        asked = {"rows": str(self.data.rows), **split, **self.settings.pairs}
        built = {"input": str(self.answers / PAIRS_NAME), "id_field": "synth_id", **split}
        built |= {"compact_map": str(dataset / "compact_vocab.npy"), "prompts_of": str(dataset)}
        built |= {"padded_vocab_size": self.dpo.cfg.model.padded_vocab_size, "seq_len": self.dpo.cfg.data.seq_length}
        commands = (
            ("own_pairs", ("eval", "pairs", str(self.sft.run)), self.answers, asked),
            ("pairs", ("data", "build-pairs"), self.dpo.dataset, built),
        )
        return [
            self.data.making(kind, (*verb, *flags(options)), output, overwrite=self.data.overwrite)
            for kind, verb, output, options in commands
        ]


@dataclass(frozen=True)
class RlPlan:
    """What is asked for.

    Attributes:
        data: whose dataset and questions are used.
        exempt: why the targets do not bind; None: they do.
    """

    data: Plan
    settings: RlSettings
    seeds: tuple[SeedPlan, ...]
    force: tuple[str, ...]
    exempt: str | None

    @classmethod
    def of(
        cls,
        root: Path,
        *,
        seeds: Sequence[int] = (),
        force: Sequence[str] = (),
        overwrite: bool = False,
        work_dir: Path | None = None,
        settings: Path | None = None,
    ) -> RlPlan:
        """What the command line asks for in the checkout ``root``; no seeds: the configuration's.

        Raises:
            QuickstartError: an unknown step to force, a seed twice, or unusable settings.
            ConfigError: a training configuration that cannot be.
        """
        if unknown := [step for step in force if step not in _FORCED]:
            raise QuickstartError(
                f"there is no step {', '.join(unknown)}", source="--force", remedy=f"use one of {', '.join(_FORCED)}"
            )
        if len(set(seeds)) < len(seeds):
            raise QuickstartError(f"seeds {list(seeds)}", source="--seed", remedy="name each once")
        read = read_settings(settings or root / SETTINGS, RlSettings)
        quickstart = read_settings(root / QUICKSTART)
        asked = quickstart.evaluation.model_copy(update={"per_family": read.per_family})
        data_of = {"rows": quickstart.rows | read.rows, "dataset": quickstart.dataset | read.dataset}
        own = quickstart.model_copy(update={**data_of, "evaluation": asked})
        data = Plan.of(root, overwrite=overwrite, work_dir=work_dir, settings=own, data=DATA)
        chosen = tuple(seeds) or (data.cfg.training.seed,)
        plans = tuple(SeedPlan.of(data, read, seed) for seed in chosen)
        return cls(data, read, plans, tuple(force), f"--settings {settings}" if settings else None)

    @property
    def report_folder(self) -> Path:
        """Of ``report.json``, ``report.md`` and ``report.png``."""
        return self.data.work / "reports" / "rl_nano"


def run_rl_nano(plan: RlPlan) -> int:
    """Do the steps, and those after the data for each seed; returns 0, or 1 below a target that binds.

    Raises:
        VpmoeError: whatever stops a step; its ``exit_code`` is that of the command that failed or of the signal.
    """
    from vpmoe.quickstart.rl_report import write_rl_report

    runner = Runner(_DOES, plan.data.work, force=plan.force, overwrite=plan.data.overwrite)
    say(f"vpMoE rl-nano in {plan.data.work}: {len(_DOES)} steps; what is done and valid is skipped")
    runner.prepare(plan.data)
    for one in plan.seeds:
        say(f"\nseed {one.seed}")
        _of_seed(one, runner)
    report = write_rl_report(plan, runner.seconds)
    return verdict(report["targets"], plan.exempt)


def _of_seed(plan: SeedPlan, runner: Runner) -> None:
    def trained(name: str, run: TrainedRun, start: Mapping[str, Any] | None = None) -> dict[str, Any]:
        runner.announce(name)
        files = runner.train(name, run, start)
        runner.evaluate(name, run, files)
        return files

    from_start = partial(trained, start=trained("sft", plan.sft))
    from_start("grpo", plan.grpo)
    runner.announce("pairs")
    for step, command in plan.pairs():
        runner.keyed("pairs", step, command)
    from_start("dpo", plan.dpo)
