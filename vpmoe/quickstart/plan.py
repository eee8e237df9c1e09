"""The quickstart as the commands that a user would type, where each puts what it makes, and what decides that."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_vpmoe.config import RunConfig, deciding_fields, load_config
from megatron_vpmoe.files import read_json, sha256_of_file
from vpmoe.commands import Command
from vpmoe.data_curation.tasks.synth_mini import TEST_NAME
from vpmoe.eval.nano import SCHEMA_VERSION as EVALUATION_VERSION
from vpmoe.quickstart.settings import QuickstartError, Settings, read_settings
from vpmoe.steps import Step, content_sha256, read_receipt

STEPS = ("environment", "tokenizer", "data", "train", "evaluate")
"""In their order; the first only looks, the others have commands."""
SETTINGS = Path("configs/nano/quickstart.toml")
ROWS, CONVERSATIONS = Path("data/synth_mini"), Path("data/synth_harmony")
"""Relative to the folder that the commands run in."""


@dataclass(frozen=True)
class Plan:
    """One quickstart: what is asked for, settings, training configuration and places.

    Attributes:
        root: the checkout; configurations are found here.
        work: data/, runs/ and reports/ go here, and commands run here.
        settings: from ``configs/nano/quickstart.toml``.
        overrides: flags to the training configuration.
        cfg: the training configuration with the overrides.
        report_folder: of ``report.json`` and ``report.png``.
        force: steps to do again even if they are done.
        overwrite: replace what was made of other settings, code or data.
        exempt: why the targets do not bind; None: they do.
    """

    root: Path
    work: Path
    settings: Settings
    overrides: tuple[str, ...]
    cfg: RunConfig
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
        settings: Path | None = None,
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
        read = read_settings(settings or root / SETTINGS)
        default = read.training.run_name
        name = run_name or (default if seed is None else f"{default}_seed{seed}")
        seeds = [] if seed is None else ["--seed", str(seed), "--data-seed", str(seed)]
        length = [] if train_iters is None else ["--train-iters", str(train_iters)]
        overrides = ("--run-name", name, *seeds, *length)
        work = Path(os.path.realpath(work_dir or root))
        reports = work / "reports" / "quickstart"
        return cls(
            root=root,
            work=work,
            settings=read,
            overrides=overrides,
            cfg=load_config(os.path.relpath(root / read.training.config), [*overrides]),
            report_folder=reports if name == default else reports / name,
            force=tuple(force),
            overwrite=overwrite,
            exempt=" ".join(length) or (f"--settings {settings}" if settings else None),
        )

    @property
    def dataset(self) -> Path:
        """The built dataset, as the training configuration names it."""
        return Path(self.cfg.data.parts[0].path)

    @property
    def run(self) -> Path:
        """The run's folder, relative to ``work`` unless the configuration says otherwise."""
        return self.cfg.run_directory

    @property
    def evaluation(self) -> Path:
        """The evaluation's report, its picture beside it; in a folder of the run, and gone with it."""
        return self.run / "evaluation" / "evaluation.json"

    def data(self) -> list[tuple[Step, Command]]:
        """The commands that make the dataset, in their order; the steps are theirs, as far as kind and place go."""
        cfg, settings = self.cfg, self.settings
        fit = {"seq_len": cfg.data.seq_length, "padded_vocab_size": cfg.model.padded_vocab_size}
        commands = (
            ("synth_mini", "synth-mini", ROWS, settings.rows),
            ("conversations", "convert", CONVERSATIONS, {"input": str(ROWS), **settings.conversations}),
            ("kd", "build", self.dataset, {"input_dir": str(CONVERSATIONS), **fit, **settings.dataset}),
        )
        also = ["--overwrite"] if self.overwrite else []
        return [
            (
                Step(kind, 0, self.work / output, {}),
                Command(("vpmoe", "data", verb, *_flags(options), "--output-dir", str(output), *also)),
            )
            for kind, verb, output, options in commands
        ]

    def training(self) -> tuple[Step, Command]:
        """The run, in place, and what goes on with it; the dataset has to be there."""
        config = os.path.relpath(self.root / self.settings.training.config, self.work)
        step = Step(
            kind="quickstart_training",
            version=1,
            output=self.work / self.run,
            decides={"config": deciding_fields(self.cfg), "dataset": self._dataset_sha256()},
            packages=("torch", "megatron-core"),
            in_place=True,
        )
        return step, Command(("vpmoe", "train", config, *self.overrides, "--resume"))

    def trained_files(self) -> dict[str, Any]:
        """The newest checkpoint's files by their path in the run, once it is the last.

        Raises:
            QuickstartError: training has not come to its end.
        """
        # Imported here: torch and megatron.core take seconds.
        from megatron_vpmoe.training.checkpoint_files import FILES, find_newest

        run = self.work / self.run
        found, _ = find_newest(run / "checkpoints", check_hashes=False)
        if found is None or found.iteration != self.cfg.training.train_iters:
            raise QuickstartError(
                f"training ended at step {found.iteration if found else 0} of {self.cfg.training.train_iters}",
                source=str(run),
                remedy="run the quickstart again to go on",
            )
        place = found.path.relative_to(run).as_posix()
        return {f"{place}/{name}": entry for name, entry in read_json(found.path / FILES).items()}

    def evaluating(self, trained: Mapping[str, Any]) -> tuple[Step, Command]:
        """The evaluation of a run whose receipt lists the files ``trained``, and the command but for its output."""
        questions = ROWS / TEST_NAME
        options = self.settings.evaluation.model_dump(exclude={"shown_samples"})
        step = Step(
            kind="nano_evaluation",
            version=EVALUATION_VERSION,
            output=(self.work / self.evaluation).parent,
            decides={
                "checkpoint": {name: entry["sha256"] for name, entry in trained.items()},
                "dataset": self._dataset_sha256(),
                "questions": sha256_of_file(self.work / questions),
                "options": {name: value for name, value in options.items() if name != "batch_size"},
            },
            packages=("torch",),
        )
        return step, Command(
            ("vpmoe", "eval", "nano", str(self.run), *_flags({"questions": str(questions), **options}))
        )

    def _dataset_sha256(self) -> str:
        """Of the dataset's contents; its manifest names the commit of the code too, which decides nothing."""
        files = read_receipt(self.work / self.dataset)["files"]
        return content_sha256({name: entry for name, entry in files.items() if name != "manifest.json"})


def _flags(options: Mapping[str, Any]) -> list[str]:
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
        else:
            shares = ",".join(f"{key}={share}" for key, share in value.items()) if isinstance(value, Mapping) else ""
            words += [flag, shares or str(value)]
    return words
