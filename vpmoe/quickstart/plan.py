"""The jobs of the quickstart: what each makes, out of what, by which commands, and where it all lies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from megatron_vpmoe.config import RunConfig, config_hash, load_config
from megatron_vpmoe.files import sha256_of_file, sha256_of_json
from vpmoe.commands import Command
from vpmoe.data_curation.conversations.store import SCHEMA_VERSION as CONVERSATIONS_VERSION
from vpmoe.data_curation.datasets.plan import SCHEMA_VERSION as DATASET_VERSION
from vpmoe.data_curation.datasets.plan import renderer_version
from vpmoe.data_curation.tasks.synth_mini import TEST_NAME, make_row
from vpmoe.quickstart import outputs
from vpmoe.quickstart.jobs import Beginning, Job, Values
from vpmoe.quickstart.settings import Settings
from vpmoe.tokenizer import rank_file

STEPS = ("environment", "tokenizer", "data", "train", "evaluate")
"""In their order; the first only looks, the others have jobs."""

_PROBED_ROWS = 64


@dataclass(frozen=True)
class Plan:
    """One quickstart: settings, training configuration and places.

    Attributes:
        root: the checkout; scripts and configurations are found here.
        work: data/, runs/ and reports/ go here, and commands run here.
        settings: from ``configs/nano/quickstart.toml``.
        overrides: flags to the training configuration.
        run_name: the run goes to ``runs/<run_name>``.
        report_folder: of ``report.json`` and ``report.png``.
        cfg: the training configuration with the overrides.
    """

    root: Path
    work: Path
    settings: Settings
    overrides: tuple[str, ...]
    run_name: str
    report_folder: Path
    cfg: RunConfig = field(init=False)

    def __post_init__(self) -> None:
        words = [*self.overrides, "--run-name", self.run_name]
        object.__setattr__(self, "cfg", load_config(os.path.relpath(self.root / self.settings.training.config), words))

    rows_path = Path("data/synth_mini")
    conversations_path = Path("data/synth_harmony")
    """Both relative to ``work``, as the commands name them."""

    @property
    def dataset_path(self) -> Path:
        """The built dataset, as the training configuration names it."""
        return Path(self.cfg.data.parts[0].path)

    @property
    def run_path(self) -> Path:
        """The run's folder, relative to ``work`` unless the configuration says otherwise."""
        return self.cfg.run_directory

    @property
    def evaluation_path(self) -> Path:
        """The report of ``vpmoe eval nano``."""
        return self.run_path / "evaluation.json"

    def jobs(self) -> list[Job]:
        """All jobs in their order."""
        return [
            self._tokenizer(),
            self._rows(),
            self._conversations(),
            self._dataset(),
            self._train(),
            self._evaluate(),
        ]

    def _from_root(self, path: str) -> str:
        """A file of the checkout as a command running in ``work`` names it."""
        return os.path.relpath(self.root / path, self.work)

    def _record(self, name: str) -> Path:
        return self.work / "data" / "quickstart" / f"{name}.json"

    def _tokenizer(self) -> Job:
        path = rank_file.DEFAULT_DIRECTORY / rank_file.FILE_NAME
        return Job(
            step="tokenizer",
            name="rank file",
            folder=None,
            record=self._record("tokenizer"),
            inputs=lambda: {"sha256": rank_file.SHA256},
            outputs=partial(outputs.rank_file_outputs, self.work / path, rank_file.SHA256),
            commands=lambda _: [Command(("vpmoe", "tokenizer", "install"))],
        )

    def _rows(self) -> Job:
        rows = self.settings.rows
        options = rows.model_dump()
        # The first rows stand for the generator's code: a change to it that matters changes them.
        probe = [make_row(rows.seed, index, rows.families) for index in range(_PROBED_ROWS)]
        words = ["--output-dir", str(self.rows_path), "--rows", str(rows.count), "--seed", str(rows.seed)]
        words += ["--families", ",".join(f"{name}={share}" for name, share in rows.families.items())]
        return Job(
            step="data",
            name="rows",
            folder=self.work / self.rows_path,
            record=self._record("rows"),
            inputs=lambda: {"options": options, "first_rows": sha256_of_json(probe)},
            outputs=partial(outputs.rows_outputs, self.work / self.rows_path),
            commands=lambda beginning: [
                Command(("vpmoe", "data", "synth-mini", *words, *_overwrite_if(beginning is Beginning.REPLACE)))
            ],
        )

    def _conversations(self) -> Job:
        options = self.settings.conversations.model_dump()
        flags = dict(options)
        developer = flags.pop("developer_instructions")
        words = ["--input", str(self.rows_path), "--output-dir", str(self.conversations_path), *_flags(flags)]
        words += ["--developer-instructions", developer] if developer else ["--omit-developer"]
        return Job(
            step="data",
            name="conversations",
            folder=self.work / self.conversations_path,
            record=self._record("conversations"),
            inputs=lambda: {
                "options": options,
                "schema": CONVERSATIONS_VERSION,
                "rows": outputs.rows_outputs(self.work / self.rows_path),
            },
            outputs=partial(outputs.conversations_outputs, self.work / self.conversations_path),
            commands=lambda beginning: [
                Command(("vpmoe", "data", "convert", *words, *_overwrite_if(beginning is Beginning.REPLACE)))
            ],
        )

    def _dataset(self) -> Job:
        dataset = self.settings.dataset
        decisive = {
            "seq_len": self.cfg.data.seq_length,
            "valid_fraction": dataset.valid_fraction,
            "compact_vocab_size": dataset.compact_vocab_size,
            "padded_vocab_size": self.cfg.model.padded_vocab_size,
        }
        words = ["--input-dir", str(self.conversations_path), "--output-dir", str(self.dataset_path), *_flags(decisive)]
        words += ["--workers", str(dataset.workers)]
        script = self._from_root("scripts/datasets/build_synth_kd_v1.py")
        return Job(
            step="data",
            name="dataset",
            folder=self.work / self.dataset_path,
            record=self._record("dataset"),
            inputs=lambda: {
                "options": decisive,
                "schema": DATASET_VERSION,
                "renderer": renderer_version("fast"),
                "conversations": outputs.conversations_outputs(self.work / self.conversations_path),
            },
            outputs=partial(outputs.dataset_outputs, self.work / self.dataset_path),
            # An interrupted build goes on after its last shard.
            commands=lambda beginning: [
                Command(("python", script, *words, *_overwrite_if(beginning is Beginning.REPLACE)))
            ],
        )

    def _train(self) -> Job:
        run = self.work / self.run_path
        config = self._from_root(self.settings.training.config)
        words = (self._from_root("scripts/train.sh"), config, "--run-name", self.run_name, *self.overrides, "--resume")

        def clear(beginning: Beginning) -> None:
            if beginning is Beginning.REPLACE:
                shutil.rmtree(run)

        return Job(
            step="train",
            name="training",
            folder=run,
            record=run / "quickstart" / "train.json",
            inputs=lambda: {
                "config_hash": config_hash(self.cfg),
                "dataset": outputs.dataset_outputs(self.work / self.dataset_path),
            },
            outputs=partial(outputs.training_outputs, run),
            commands=lambda _: [Command(words)],
            prepare=clear,
            complete=lambda made: made["iteration"] == self.cfg.training.train_iters,
        )

    def _evaluate(self) -> Job:
        evaluation = self.settings.evaluation
        questions = self.rows_path / TEST_NAME
        decisive = {name: getattr(evaluation, name) for name in ("per_family", "max_new_tokens", "samples")}
        words = [str(self.run_path), "--questions", str(questions)]
        words += [*_flags(decisive), "--batch-size", str(evaluation.batch_size), "--output", str(self.evaluation_path)]

        def inputs() -> Values:
            return {
                "options": decisive,
                "checkpoint": outputs.training_outputs(self.work / self.run_path),
                "questions": sha256_of_file(self.work / questions),
            }

        return Job(
            step="evaluate",
            name="evaluation",
            folder=None,
            record=self.work / self.run_path / "quickstart" / "evaluate.json",
            inputs=inputs,
            outputs=partial(outputs.evaluation_outputs, self.work / self.evaluation_path),
            commands=lambda _: [Command(("vpmoe", "eval", "nano", *words))],
        )


def _flags(options: Values) -> Sequence[str]:
    return [word for name, value in options.items() for word in ("--" + name.replace("_", "-"), str(value))]


def _overwrite_if(needed: bool) -> Sequence[str]:
    return ["--overwrite"] if needed else []
