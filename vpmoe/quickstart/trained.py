"""A training run and its evaluation as keyed steps, by the commands a user would type."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.config import RunConfig, deciding_fields
from megatron_vpmoe.files import read_json, sha256_of_file
from vpmoe.commands import Command
from vpmoe.data_curation.tasks.synth_mini import TEST_NAME
from vpmoe.eval.nano import VERSION as EVALUATION_VERSION
from vpmoe.quickstart.settings import Evaluation, QuickstartError
from vpmoe.steps import Step, content_sha256, read_receipt

if TYPE_CHECKING:
    from megatron_vpmoe.training.checkpoint_files import Found

DATA = Path("data")
"""Of the quickstart's rows and conversations, relative to the folder that the commands run in."""
EVALUATION = "evaluation.json"
"""The report of an evaluation, in a folder of its own."""
Files = Mapping[str, Any]
"""Of a run, by their path in it, as ``TrainedRun.trained_files`` gives them."""


def making(work: Path, kind: str, words: Sequence[str], output: Path, *, overwrite: bool) -> tuple[Step, Command]:
    """A command of ``vpmoe`` that makes ``output`` in ``work`` and keys its step itself; kind and place count of it."""
    also = ["--overwrite"] if overwrite else []
    return Step(kind, 0, work / output, {}), Command(("vpmoe", *words, "--output-dir", str(output), *also))


@dataclass(frozen=True)
class TrainedRun:
    """One run: its configuration and places.

    Attributes:
        root: the checkout; configurations are found here.
        work: data/, runs/ and reports/ go here, and commands run here.
        config: the training configuration's file, relative to the checkout.
        overrides: flags to it.
        cfg: the training configuration with the overrides.
    """

    root: Path
    work: Path
    config: str
    overrides: tuple[str, ...]
    cfg: RunConfig

    @property
    def dataset(self) -> Path:
        """The built dataset, as the training configuration names it; of a blend the first."""
        return Path(self.cfg.data.parts[0].path)

    @property
    def run(self) -> Path:
        """The run's folder, relative to ``work`` unless the configuration says otherwise."""
        return self.cfg.run_directory

    @property
    def metrics(self) -> Path:
        """The run's ``metrics.jsonl``."""
        return self.work / self.run / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        """The evaluation's report, its picture beside it; in a folder of the run, and gone with it."""
        return self.run / "evaluation" / EVALUATION

    def training(self, start: Files | None = None) -> tuple[Step, Command]:
        """The run, in place, and what goes on with it; the datasets have to be there.

        Args:
            start: files of the run whose weights it begins with, as ``trained_files`` gives them.
        """
        config = os.path.relpath(self.root / self.config, self.work)
        datasets = [dataset_sha256(self.work / part.path) for part in self.cfg.data.parts]
        decides = {
            "config": deciding_fields(self.cfg),
            "dataset": datasets[0] if len(datasets) == 1 else datasets,
        }
        step = Step(
            kind="quickstart_training",
            version=1,
            output=self.work / self.run,
            decides=decides if start is None else {**decides, "start": hashes(start)},
            packages=("torch", "megatron-core"),
            in_place=True,
        )
        return step, Command(("vpmoe", "train", config, *self.overrides, "--resume"))

    def trained_files(self) -> dict[str, Any]:
        """The newest checkpoint's files by their path in the run, once it is the last.

        Raises:
            QuickstartError: training has not come to its end.
        """
        from megatron_vpmoe.training.checkpoint_files import FILES

        found = self._last()
        place = found.path.relative_to(self.work / self.run).as_posix()
        return {f"{place}/{name}": entry for name, entry in read_json(found.path / FILES).items()}

    def provenance(self) -> dict[str, Any]:
        """What its last checkpoint says of where it comes from.

        Raises:
            QuickstartError: training has not come to its end.
        """
        return self._last().state["provenance"]

    def _last(self) -> Found:
        # Imported here: torch and megatron.core take seconds.
        from megatron_vpmoe.training.checkpoint_files import find_newest

        run = self.work / self.run
        found, _ = find_newest(run / "checkpoints", check_hashes=False)
        if found is None or found.iteration != self.cfg.training.train_iters:
            raise QuickstartError(
                f"training ended at step {found.iteration if found else 0} of {self.cfg.training.train_iters}",
                source=str(run),
                remedy="give the same command again to go on",
            )
        return found


@dataclass(frozen=True)
class QuestionedRun(TrainedRun):
    """One that answers held-out questions in the end.

    Attributes:
        asked: which questions, and how.
        data: folder of rows, held-out questions and conversations, relative to ``work``.
    """

    asked: Evaluation
    data: Path

    @property
    def rows(self) -> Path:
        """Rows and held-out questions, relative to ``work``."""
        return self.data / "synth_mini"

    def evaluating(self, trained: Files, teacher: tuple[TrainedRun, Files] | None = None) -> tuple[Step, Command]:
        """The evaluation of a run, and the command but for its output.

        Args:
            trained: the files that the run's receipt lists.
            teacher: a run to tell the distance to, and its files.
        """
        questions = self.rows / TEST_NAME
        options = self.asked.model_dump(exclude={"shown_samples"})
        step = Step(
            kind="nano_evaluation",
            version=EVALUATION_VERSION,
            output=(self.work / self.evaluation).parent,
            decides={
                "checkpoint": hashes(trained),
                "dataset": dataset_sha256(self.work / self.dataset),
                "questions": sha256_of_file(self.work / questions),
                "options": {name: value for name, value in options.items() if name != "batch_size"},
                **({} if teacher is None else {"teacher": hashes(teacher[1])}),
            },
            packages=("torch",),
        )
        asked = {"questions": str(questions), **({"teacher": str(teacher[0].run)} if teacher else {}), **options}
        return step, Command(("vpmoe", "eval", "nano", str(self.run), *flags(asked)))


def dataset_sha256(dataset: Path) -> str:
    """Of a dataset's contents; its manifest names the commit of the code too, which decides nothing."""
    files = read_receipt(dataset)["files"]
    return content_sha256({name: entry for name, entry in files.items() if name != "manifest.json"})


def hashes(files: Files) -> dict[str, str]:
    """What of files decides."""
    return {name: entry["sha256"] for name, entry in files.items()}


def flags(options: Mapping[str, Any]) -> list[str]:
    """Options of a command as its words; a mapping as name=share,name=share."""
    words: list[str] = []
    for name, value in options.items():
        flag = f"--{name.replace('_', '-')}"
        if isinstance(value, bool):
            words += [flag] if value else []
        else:
            shares = ",".join(f"{key}={share}" for key, share in value.items()) if isinstance(value, Mapping) else ""
            words += [flag, shares or str(value)]
    return words
