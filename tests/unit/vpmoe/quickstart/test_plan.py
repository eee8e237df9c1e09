"""The jobs of the real settings: commands that their programs accept, and inputs that change when they should."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_vpmoe.errors import ConfigError
from vpmoe.data_curation.tasks.synth_mini import BUCKETS, generate, parse_mix
from vpmoe.quickstart.errors import QuickstartError
from vpmoe.quickstart.jobs import Beginning, Job
from vpmoe.quickstart.plan import STEPS, Plan
from vpmoe.quickstart.run import SETTINGS, Request


@pytest.fixture
def plan(tmp_path: Path, repository: Path) -> Plan:
    return Request(work_dir=tmp_path).plan(repository)


def words_of(plan: Plan, name: str, beginning: Beginning = Beginning.FRESH, command: int = 0) -> list[str]:
    (job,) = (job for job in plan.jobs() if job.name == name)
    return list(job.commands(beginning)[command].words)


def inputs_of(plan: Plan) -> dict[str, dict]:
    """Of the jobs whose inputs need no outputs of earlier ones."""
    return {job.name: job.inputs() for job in plan.jobs() if job.name != "evaluation"}


def with_setting(plan: Plan, section: str, **changes: object) -> Plan:
    """The plan with other settings in one section."""
    changed = getattr(plan.settings, section).model_copy(update=changes)
    return replace(plan, settings=plan.settings.model_copy(update={section: changed}))


def test_one_job_or_more_for_every_step(plan: Plan) -> None:
    assert list(dict.fromkeys(job.step for job in plan.jobs())) == list(STEPS[1:])


def test_commands_say_what_the_settings_say(plan: Plan) -> None:
    settings = plan.settings
    words = words_of(plan, "rows")
    assert parse_mix(words[words.index("--families") + 1]) == settings.rows.families
    convert = words_of(plan, "conversations")
    assert convert[convert.index("--reasoning-effort") + 1] == settings.conversations.reasoning_effort
    assert convert[convert.index("--model-identity") + 1] == settings.conversations.model_identity
    assert ("--omit-developer" in convert) is (settings.conversations.developer_instructions == "")
    words = words_of(plan, "dataset")[2:]
    build = dict(zip(words[::2], words[1::2], strict=True))
    assert build["--padded-vocab-size"] == str(plan.cfg.model.padded_vocab_size)
    assert build["--seq-len"] == str(plan.cfg.data.seq_length)
    assert build["--valid-fraction"] == str(settings.dataset.valid_fraction)
    assert build["--output-dir"] == plan.cfg.data.data_path
    assert "--overwrite" not in build


def test_settings_fit_the_model_and_the_generator(plan: Plan) -> None:
    dataset = plan.settings.dataset
    assert dataset.compact_vocab_size <= plan.cfg.model.padded_vocab_size
    assert (dataset.valid_fraction * BUCKETS) % 1 == pytest.approx(0)


@pytest.mark.parametrize(
    ("name", "overwrites"),
    [
        ("rows", {Beginning.REPLACE}),
        ("conversations", {Beginning.REPLACE}),
        ("dataset", {Beginning.REPLACE}),
    ],
)
def test_overwrites_only_what_it_must(plan: Plan, name: str, overwrites: set[Beginning]) -> None:
    assert {beginning for beginning in Beginning if "--overwrite" in words_of(plan, name, beginning)} == overwrites


def test_training_always_resumes_and_stays_in_the_work_folder(plan: Plan) -> None:
    words = words_of(plan, "training")
    assert words[-1] == "--resume" and (plan.work / words[0]).resolve() == plan.root / "scripts" / "train.sh"
    assert plan.run_path == Path("runs") / plan.run_name


def test_seed_changes_the_training_alone(tmp_path: Path, repository: Path, plan: Plan) -> None:
    seeded = Request(work_dir=tmp_path, seed=7).plan(repository)
    assert (seeded.cfg.training.seed, seeded.cfg.data.data_seed) == (7, 7)
    assert seeded.run_name != plan.run_name and seeded.report_folder != plan.report_folder
    changed = [name for name, inputs in inputs_of(plan).items() if inputs != inputs_of(seeded)[name]]
    assert changed == ["training"]


@pytest.mark.parametrize(
    ("section", "name", "changed"),
    [
        ("rows", "count", ["rows"]),
        ("rows", "seed", ["rows"]),
        ("conversations", "num_shards", ["conversations"]),
        ("dataset", "compact_vocab_size", ["dataset"]),
        ("dataset", "workers", []),
        ("evaluation", "shown_samples", []),
    ],
)
def test_a_setting_changes_its_own_job(plan: Plan, section: str, name: str, changed: list[str]) -> None:
    value = getattr(getattr(plan.settings, section), name)
    other = with_setting(plan, section, **{name: value + 1})
    assert [job for job, inputs in inputs_of(plan).items() if inputs != inputs_of(other)[job]] == changed


def test_outputs_of_one_job_are_inputs_of_the_next(plan: Plan) -> None:
    """Another manifest upstream changes every job below it."""
    before = inputs_of(plan)
    generate(plan.work / plan.rows_path, rows=1, seed=1, families={"sorting": 1.0})
    after = inputs_of(plan)
    assert before["rows"] == after["rows"] and before["conversations"] != after["conversations"]


def test_replacing_a_run_removes_it(plan: Plan) -> None:
    job: Job = next(job for job in plan.jobs() if job.name == "training")
    run = plan.work / plan.run_path
    (run / "checkpoints").mkdir(parents=True)
    job.prepare(Beginning.CONTINUE)
    assert run.is_dir()
    job.prepare(Beginning.REPLACE)
    assert not run.exists()


def test_training_is_complete_at_its_last_step(plan: Plan) -> None:
    job: Job = next(job for job in plan.jobs() if job.name == "training")
    last = plan.cfg.training.train_iters
    assert job.complete({"iteration": last}) and not job.complete({"iteration": last - 1})


def test_unknown_step_and_impossible_length(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(QuickstartError, match="no step trian"):
        Request(work_dir=tmp_path, force=("trian",)).plan(repository)
    with pytest.raises(ConfigError, match="warm-up"):
        Request(work_dir=tmp_path, train_iters=1).plan(repository)


def test_only_default_settings_bind(tmp_path: Path, repository: Path) -> None:
    assert Request(seed=3, run_name="x").why_not_held() is None
    assert Request(train_iters=50).why_not_held() == "--train-iters 50"
    copied = shutil.copy(repository / SETTINGS, tmp_path / "mine.toml")
    assert "mine.toml" in (Request(settings=Path(copied)).why_not_held() or "")
