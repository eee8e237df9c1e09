"""The quickstart as the commands that a user would type, where each puts what it makes, and what decides that."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_vpmoe.config import load_config
from vpmoe.commands import Command
from vpmoe.quickstart.settings import QuickstartError, Settings, read_settings
from vpmoe.quickstart.trained import DATA, QuestionedRun, flags, making
from vpmoe.steps import Step

STEPS = ("environment", "tokenizer", "data", "train", "evaluate")
"""In their order; the first only looks, the others have commands."""
SETTINGS = Path("configs/nano/quickstart.toml")


@dataclass(frozen=True)
class Plan(QuestionedRun):
    """One quickstart: its run, and what is asked for.

    Attributes:
        settings: from ``configs/nano/quickstart.toml``.
        report_folder: of ``report.json`` and ``report.png``.
        force: steps to do again even if they are done.
        overwrite: replace what was made of other settings, code or data.
        exempt: why the targets do not bind; None: they do.
    """

    settings: Settings
    report_folder: Path
    force: tuple[str, ...]
    overwrite: bool
    exempt: str | None

    @classmethod
    def of(
        cls,
        root: Path,
        *,
        seed: int | None = None,
        run_name: str | None = None,
        train_iters: int | None = None,
        force: Sequence[str] = (),
        overwrite: bool = False,
        work_dir: Path | None = None,
        settings: Path | Settings | None = None,
        data: Path = DATA,
    ) -> Plan:
        """What the command line asks for in the checkout ``root``; None is the default of settings and configuration.

        Raises:
            QuickstartError: an unknown step to force, or unusable settings.
            ConfigError: a training configuration that cannot be.
        """
        if unknown := [step for step in force if step not in STEPS[1:]]:
            raise QuickstartError(
                f"there is no step {', '.join(unknown)}", source="--force", remedy=f"use one of {', '.join(STEPS[1:])}"
            )
        read = settings if isinstance(settings, Settings) else read_settings(settings or root / SETTINGS)
        default = read.training.run_name
        name = run_name or (default if seed is None else f"{default}_seed{seed}")
        seeds = [] if seed is None else ["--seed", str(seed), "--data-seed", str(seed)]
        length = [] if train_iters is None else ["--train-iters", str(train_iters)]
        # Other data stand in a dataset of their own; the quickstart's is where its configuration says.
        place = [] if data == DATA else ["--data-path", str(data / "dataset")]
        overrides = ("--run-name", name, *seeds, *length, *place)
        work = Path(os.path.realpath(work_dir or root))
        reports = work / "reports" / "quickstart"
        return cls(
            root=root,
            work=work,
            config=read.training.config,
            overrides=overrides,
            cfg=load_config(os.path.relpath(root / read.training.config), [*overrides]),
            asked=read.evaluation,
            data=data,
            settings=read,
            report_folder=reports if name == default else reports / name,
            force=tuple(force),
            overwrite=overwrite,
            exempt=" ".join(length) or (f"--settings {settings}" if isinstance(settings, Path) else None),
        )

    def preparing(self) -> list[tuple[Step, Command]]:
        """The commands that make the dataset, in their order; the steps are theirs, as far as kind and place go."""
        cfg, settings, conversations = self.cfg, self.settings, self.data / "synth_harmony"
        fit = {"seq_len": cfg.data.seq_length, "padded_vocab_size": cfg.model.padded_vocab_size}
        commands = (
            ("synth_mini", "synth-mini", self.rows, settings.rows),
            ("conversations", "convert", conversations, {"input": str(self.rows), **settings.conversations}),
            ("kd", "build", self.dataset, {"input_dir": str(conversations), **fit, **settings.dataset}),
        )
        return [
            making(self.work, kind, ("data", verb, *flags(options)), output, overwrite=self.overwrite)
            for kind, verb, output, options in commands
        ]
