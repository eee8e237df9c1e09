"""``vpmoe nano-moe``: commands that their programs accept, each reading what another makes; how targets are held."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.unit.vpmoe.quickstart.test_plan import write_dataset
from vpmoe import cli
from vpmoe.commands import Command
from vpmoe.quickstart.proof import Proof
from vpmoe.quickstart.report import missed_line
from vpmoe.quickstart.settings import QuickstartError, StorySettings, StoryTargets
from vpmoe.quickstart.stories import StoryRuns, plan_of
from vpmoe.quickstart.stories_report import held_against, table


@pytest.fixture
def plan(tmp_path: Path, repository: Path) -> Proof[StorySettings]:
    return plan_of(repository, seeds=(3, 4), work_dir=tmp_path)


def parsed(command: Command) -> dict[str, Any]:
    """Options as the command's own program reads them, without running it."""
    room, name, *words = command.words[1:]
    group: Any = cli.command_of(room)
    return group.commands[name].make_context(name, words).params


def test_each_command_reads_what_another_makes(plan: Proof[StorySettings]) -> None:
    one, other = (StoryRuns.of(plan, seed) for seed in plan.seeds)
    made = list(one.preparing())
    assert [name for name, *_ in made] == ["stories"] * 3 + ["tokenizer"] + ["data"] * 3
    (stories, prompts, pairs, vocabulary, *built), options = [s for _, s, _ in made], [parsed(c) for *_, c in made]
    learn, *builds = options[3:]
    assert plan.work / learn["input"] == stories.output and learn["special_tokens"] == "harmony"
    assert [plan.work / build["input"] for build in builds] == [stories.output, prompts.output, pairs.output]
    for step, build, run in zip(built, builds, one.parts.values(), strict=True):
        assert step.output == plan.work / run.dataset and plan.work / build["tokenizer"] == vocabulary.output
        assert build["padded_vocab_size"] == learn["vocab_size"] == run.cfg.model.padded_vocab_size
        assert build["seq_len"] == run.cfg.data.seq_length
        assert (build["id_field"], build["split_field"]) == ("id", "split")
    assert one.sft.cfg.checkpoint.load_weights == str(one.pretrain.run)
    assert one.dpo.cfg.checkpoint.load_weights == one.dpo.cfg.training.reference_weights == str(one.sft.run)
    assert len({run.run for runs in (one, other) for run in runs.parts.values()}) == 6
    # Other seeds are other trainings on the same data; stages are one model.
    assert [entry[1:] for entry in other.preparing()] == [entry[1:] for entry in made]
    assert len({run.cfg.model.model_dump_json() for run in one.parts.values()}) == 1


def test_every_model_is_asked_the_same_and_the_pretrained_one_in_plain_text(plan: Proof[StorySettings]) -> None:
    runs = StoryRuns.of(plan, 3)
    (plan.work / runs.prompts).parent.mkdir(parents=True)
    (plan.work / runs.prompts).write_text("prompts")
    asked = {part: parsed(runs.evaluating(part, {})[1]) for part in runs.parts}
    assert [asked[part].pop("passage") for part in asked] == [True, False, False]
    assert [asked[part].pop("where") for part in asked] == [run.run for run in runs.parts.values()]
    assert asked["pretrain"] == asked["sft"] == asked["dpo"]
    assert asked["sft"]["prompts"] == runs.prompts and asked["sft"]["split"] == "test"
    before, *others = [runs.evaluating("sft", files)[0].key for files in ({}, {"a": {"sha256": "1"}})]
    (plan.work / runs.prompts).write_text("other prompts")
    assert before not in [*others, runs.evaluating("sft", {})[0].key]


def test_the_full_budget_has_places_of_its_own(repository: Path, tmp_path: Path) -> None:
    proofs = [plan_of(repository, full=full, work_dir=tmp_path) for full in (False, True)]
    reduced, full = (StoryRuns.of(proof, 1) for proof in proofs)
    steps = [{step.output for _, step, _ in runs.preparing()} for runs in (reduced, full)]
    assert not steps[0] & steps[1] and proofs[0].name != proofs[1].name
    for part, run in reduced.parts.items():
        larger = full.parts[part]
        assert run.run != larger.run and run.cfg.model == larger.cfg.model
    tokens = [
        one.pretrain.cfg.training.train_iters * one.pretrain.cfg.training.global_batch_size for one in (reduced, full)
    ]
    assert tokens[1] > 4 * tokens[0]


def test_wishes_that_cannot_be(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(QuickstartError, match="no step train"):
        plan_of(repository, work_dir=tmp_path, force=("train",))
    with pytest.raises(QuickstartError, match=r"seeds \[1, 1\]"):
        plan_of(repository, work_dir=tmp_path, seeds=(1, 1))
    wishes = (repository / "configs" / "nano_moe" / "pipeline.toml").read_text()
    (tmp_path / "own.toml").write_text(wishes.replace("max_new_tokens = 48", "max_new_tokens = 1"))
    with pytest.raises(QuickstartError, match=r"figures.max_new_tokens = 1: .*or equal to 2"):
        plan_of(repository, work_dir=tmp_path, settings=tmp_path / "own.toml")


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, set()),
        ({"perplexity": 6.01}, {"perplexity"}),
        ({"required_words": {"pretrained": 0.2, "sft": 0.59, "dpo": 0.9}}, {"required words after SFT"}),
        ({"required_words": {"pretrained": 0.4, "sft": 0.65, "dpo": 0.9}}, {"required words gained by SFT"}),
        ({"protagonist": {"pretrained": 0.1, "sft": 0.8, "dpo": 0.89}}, {"protagonist gained by DPO"}),
        ({"banned_words": {"pretrained": 0.0, "sft": 0.0, "dpo": 0.06}}, {"banned words after DPO"}),
    ],
)
def test_targets_hold_of_each_seed(changes: dict[str, Any], missed: set[str]) -> None:
    targets = StoryTargets(
        perplexity=6.0, required_words=0.6, required_words_gain=0.3, protagonist_gain=0.1, banned_words=0.05
    )
    shares = {"pretrained": 0.1, "sft": 0.7, "dpo": 0.85}
    good: dict[str, Any] = {"perplexity": 5.0, "required_words": shares, "protagonist": shares, "ended": shares}
    good |= {"banned_words": dict.fromkeys(shares, 0.01), "tokens": dict.fromkeys(shares, 1000)}
    good["by_chance"] = {name: shares for name in ("required_words", "protagonist", "banned_words")}
    seeds = [{"seed": 1, **good}, {"seed": 2, **good, **changes}]
    held = held_against(targets, seeds)
    assert held["met"] is (not missed)
    found = {name for name, entry in held["entries"].items() if not entry["met"]}
    assert found == {f"seed 2: {name}" for name in missed}
    assert "| 2 | dpo |  | " in table(seeds)
    if missed == {"perplexity"}:
        assert missed_line(held) == "seed 2: perplexity is 6.01, at most 6 is the target"
    if missed == {"banned words after DPO"}:
        assert missed_line(held) == "seed 2: banned words after DPO is 6.0 %, at most 5 % is the target"


def test_other_seeds_leave_the_figures_of_those_before(plan: Proof[StorySettings]) -> None:
    seeds = [StoryRuns.of(plan, seed) for seed in plan.seeds]
    (plan.work / seeds[0].prompts).parent.mkdir(parents=True)
    (plan.work / seeds[0].prompts).write_text("prompts")
    places = [runs.drawing([{"a": {"sha256": str(runs.seed)}}]).output for runs in seeds]
    assert [place.relative_to(plan.work).as_posix() for place in places] == [
        "reports/nano_moe/figs_3",
        "reports/nano_moe/figs_4",
    ]


def test_what_decides_a_likelihood(plan: Proof[StorySettings]) -> None:
    runs = StoryRuns.of(plan, 3)
    write_dataset(runs.pretrain)
    keys = [runs.foretelling(files)[0].key for files in ({}, {"a": {"sha256": "1"}})]
    write_dataset(runs.pretrain, tokens="3 2 1")
    keys.append(runs.foretelling({})[0].key)
    assert len({str(key) for key in keys}) == 3
    assert parsed(runs.foretelling({})[1])["data_path"] == runs.pretrain.dataset
