"""The plan of the real settings: commands that their programs accept, and keys that change when they should."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import typer

from megatron_vpmoe.errors import ConfigError
from vpmoe import steps
from vpmoe.commands import Command
from vpmoe.data_curation.app import app as data_app
from vpmoe.data_curation.tasks.synth_mini import BUCKETS, parse_mix
from vpmoe.eval.app import app as eval_app
from vpmoe.quickstart.plan import SETTINGS, Plan
from vpmoe.quickstart.settings import QuickstartError
from vpmoe.quickstart.trained import TrainedRun


def write_dataset(plan: TrainedRun, **files: str) -> None:
    """A dataset of these contents, with its receipt; in place of the one there."""

    def make(work: steps.Work) -> dict[str, Any]:
        for name, text in {"manifest": "{}", "tokens": "1 2 3", **files}.items():
            (work.folder / f"{name}.json").write_text(text)
        return {}

    steps.run(steps.Step("kd", 1, plan.work / plan.dataset, files), make, overwrite=True)


@pytest.fixture
def plan(tmp_path: Path, repository: Path) -> Plan:
    made = Plan.of(repository, work_dir=tmp_path)
    write_dataset(made)
    questions = tmp_path / "data/synth_mini/test.jsonl"
    questions.parent.mkdir(parents=True)
    questions.write_text("{}")
    return made


def parsed(app: typer.Typer, command: Command) -> dict[str, Any]:
    """Options as the command's own program reads them, without running it."""
    name, *words = command.words[2:]
    group: Any = typer.main.get_command(app)
    return group.commands[name].make_context(name, words).params


def test_commands_say_what_the_settings_say(plan: Plan, repository: Path) -> None:
    settings = plan.settings
    rows, convert, build = (parsed(data_app, command) for _, command in plan.preparing())
    assert parse_mix(rows["families"]) == settings.rows["families"] and rows["rows"] == settings.rows["rows"]
    assert convert["reasoning_effort"] == settings.conversations["reasoning_effort"]
    assert convert["model_identity"] == settings.conversations["model_identity"]
    assert convert["omit_developer"] and not convert["overwrite"]
    assert build["padded_vocab_size"] == plan.cfg.model.padded_vocab_size
    assert build["seq_len"] == plan.cfg.data.seq_length
    assert build["valid_fraction"] == settings.dataset["valid_fraction"]
    assert str(build["output_dir"]) == plan.cfg.data.data_path and not build["overwrite"]
    for _, command in Plan.of(repository, work_dir=plan.work, overwrite=True).preparing():
        assert parsed(data_app, command)["overwrite"]


def test_each_command_reads_what_the_one_before_makes(plan: Plan) -> None:
    (rows, _), (conversations, convert), (dataset, build) = plan.preparing()
    assert plan.work / parsed(data_app, convert)["source"] == rows.output
    assert plan.work / parsed(data_app, build)["input_dir"] == conversations.output
    assert dataset.output == plan.work / plan.dataset
    step, evaluate = plan.evaluating({})
    options = parsed(eval_app, evaluate)
    assert plan.work / options["questions"] == rows.output / "test.jsonl" and options["where"] == plan.run
    assert options["per_family"] == plan.settings.evaluation.per_family
    assert step.output == plan.work / plan.run / "evaluation"


def test_settings_fit_the_model_and_the_generator(plan: Plan) -> None:
    dataset: Any = plan.settings.dataset
    assert dataset["compact_vocab_size"] <= plan.cfg.model.padded_vocab_size
    assert (dataset["valid_fraction"] * BUCKETS) % 1 == pytest.approx(0)


def test_training_always_resumes_and_stays_in_the_work_folder(plan: Plan) -> None:
    step, command = plan.training()
    assert command.words[:2] == ("vpmoe", "train") and command.words[-1] == "--resume"
    assert (plan.work / command.words[2]).resolve() == plan.root / "configs" / "nano" / "stage1.yaml"
    assert step.in_place and step.output == plan.work / "runs" / plan.cfg.training.run_name


def test_seed_changes_the_training_alone(plan: Plan) -> None:
    seeded = Plan.of(plan.root, work_dir=plan.work, seed=7)
    assert (seeded.cfg.training.seed, seeded.cfg.data.data_seed) == (7, 7)
    assert seeded.run != plan.run and seeded.report_folder != plan.report_folder
    assert seeded.preparing() == plan.preparing()
    assert seeded.training()[0].key != plan.training()[0].key


def test_what_decides_training_and_evaluation(plan: Plan) -> None:
    """Not logging and batches; but the dataset, the checkpoint, the questions and the options."""
    before = plan.training()[0].key, plan.evaluating({})[0].key
    logged = plan.cfg.model_copy(update={"logging": plan.cfg.logging.model_copy(update={"log_interval": 3})})
    batched = plan.settings.evaluation.model_copy(update={"batch_size": 1, "shown_samples": 0})
    object.__setattr__(plan, "cfg", logged)
    object.__setattr__(plan, "asked", batched)
    assert (plan.training()[0].key, plan.evaluating({})[0].key) == before
    assert plan.evaluating({"iter/a": {"sha256": "1", "bytes": 1}})[0].key != before[1]
    (plan.work / "data/synth_mini/test.jsonl").write_text("[]")
    assert plan.evaluating({})[0].key != before[1] and plan.training()[0].key == before[0]
    write_dataset(plan, manifest="of another commit")
    assert plan.training()[0].key == before[0]
    write_dataset(plan, tokens="3 2 1")
    assert plan.training()[0].key != before[0]


def test_unknown_step_and_impossible_length(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(QuickstartError, match="no step trian"):
        Plan.of(repository, work_dir=tmp_path, force=("trian",))
    with pytest.raises(ConfigError, match="warm-up"):
        Plan.of(repository, work_dir=tmp_path, train_iters=1)


def test_only_default_settings_bind(tmp_path: Path, repository: Path) -> None:
    assert Plan.of(repository, seed=3, run_name="x").exempt is None
    assert Plan.of(repository, train_iters=50).exempt == "--train-iters 50"
    copied = shutil.copy(repository / SETTINGS, tmp_path / "mine.toml")
    assert "mine.toml" in (Plan.of(repository, settings=Path(copied)).exempt or "")
