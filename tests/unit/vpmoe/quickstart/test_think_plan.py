"""``vpmoe think-nano``: commands that their programs accept, who starts from what, equal tokens, balanced domains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_vpmoe.data.mixture import Mixture
from megatron_vpmoe.sources.stored import weights_of
from tests.unit.vpmoe.quickstart.test_plan import parsed
from vpmoe import steps
from vpmoe.data_curation.tasks.synth_mini import BUCKETS, parse_mix
from vpmoe.quickstart.proof import Proof
from vpmoe.quickstart.settings import QuickstartError, ThinkSettings
from vpmoe.quickstart.think import LANGUAGE_MODELS, ThinkRuns, corpora, plan_of
from vpmoe.quickstart.trained import TrainedRun
from vpmoe.teacher.app import app as data_app


@pytest.fixture
def plan(tmp_path: Path, repository: Path) -> Proof[ThinkSettings]:
    return plan_of(repository, seeds=(3, 4), work_dir=tmp_path)


def _make_datasets(run: TrainedRun, **changed: str) -> None:
    """Those of its blend, with their receipts; ``changed``: the tokens of some of them."""
    for part in run.cfg.data.parts:
        text = changed.get(part.label, "1 2 3")

        def make(work: steps.Work, text: str = text) -> dict[str, Any]:
            (work.folder / "tokens").write_text(text)
            return {}

        steps.run(steps.Step("kd", 1, run.work / part.path, {"text": text}), make, overwrite=True)


def test_the_data_are_five_domains_of_one_vocabulary(plan: Proof[ThinkSettings]) -> None:
    together, *domains = corpora(plan)
    run = ThinkRuns.of(plan, 3).full
    assert len(domains) == 5 == len(set(run.cfg.data.parts))
    mixes = []
    for corpus, part in zip(domains, run.cfg.data.parts, strict=True):
        rows, convert, build = (parsed(data_app, command) for _, command in corpus.preparing())
        assert convert["source"] == str(rows["output_dir"]) and build["input_dir"] == convert["output_dir"]
        assert build["output_dir"] == Path(part.path) and part.path.split("/")[-2] == part.label
        # Documents are split by a hash, whose buckets keep questions apart too.
        assert build["split_by"] == "id" and (build["valid_fraction"] * BUCKETS).is_integer()
        assert build["compact_map"] == together.dataset / "compact_vocab.npy" and build["compact_vocab_size"] is None
        assert build["padded_vocab_size"] == run.cfg.model.padded_vocab_size
        assert build["seq_len"] == run.cfg.data.seq_length
        mixes.append(parse_mix(rows["families"]))
    # No family is in two domains, and the vocabulary is counted over all of them, each domain the same share.
    assert sum(map(len, mixes)) == len({family for mix in mixes for family in mix})
    rows, _, build = (parsed(data_app, command) for _, command in together.preparing())
    counted = parse_mix(rows["families"])
    assert (
        build["compact_vocab_size"]
        and [sum(counted[family] for family in mix) for mix in mixes] == [pytest.approx(1.0)] * 5
    )


def test_the_sampler_balances_domains(plan: Proof[ThinkSettings]) -> None:
    for run in ThinkRuns.of(plan, 3).parts.values():
        rows = run.cfg.training.train_iters * run.cfg.training.global_batch_size
        counts = Mixture(weights_of(run.cfg)).counts(rows)
        assert sum(counts) == rows and max(counts) - min(counts) <= 1


def test_who_starts_from_what_and_for_how_long(plan: Proof[ThinkSettings]) -> None:
    one, other = (ThinkRuns.of(plan, seed) for seed in plan.seeds)
    transformer = one.experts["transformer"]
    assert transformer.cfg.checkpoint.load_embedding is None and transformer.cfg.training.train_only is None
    for name in ("state_space", "diffuser"):
        cfg = one.experts[name].cfg
        assert cfg.checkpoint.load_embedding == str(transformer.run) and cfg.training.train_only == ["decoder.*"]
    experts = [str(run.run) for run in one.experts.values()]
    assert one.full.cfg.checkpoint.load_experts == one.storeless.cfg.checkpoint.load_experts == experts
    assert one.full.cfg.training.train_only == one.storeless.cfg.training.train_only
    assert one.storeless.cfg.data.store is one.storeless.cfg.model.memory_entries is None
    assert one.full.cfg.model.memory_entries == plan.settings.memory_entries
    budget = one.full.cfg.training
    for name in LANGUAGE_MODELS:
        alone, expert = one.alone[name].cfg, one.experts[name].cfg
        assert alone.checkpoint.load_weights == str(one.experts[name].run) and alone.model == expert.model
        assert alone.training.train_iters == budget.train_iters
        assert alone.training.global_batch_size == budget.global_batch_size
        assert alone.data == one.storeless.cfg.data  # the same rows in the same order
    assert len({run.run for runs in (one, other) for run in runs.parts.values()}) == 2 * len(one.parts) == 14
    assert len({(run.cfg.model.hidden_size, run.cfg.model.padded_vocab_size) for run in one.parts.values()}) == 1


def test_every_dataset_and_expert_decides_a_training(plan: Proof[ThinkSettings]) -> None:
    run = ThinkRuns.of(plan, 3).full
    _make_datasets(run)
    keys = [run.training(files)[0].key for files in ({}, {"transformer/a": {"sha256": "1"}})]
    _make_datasets(run, lookup="3 2 1")
    keys.append(run.training({})[0].key)
    assert len({str(key) for key in keys}) == 3


def test_the_store_is_of_the_training_data_and_the_shared_embedding(plan: Proof[ThinkSettings]) -> None:
    one, other = (ThinkRuns.of(plan, seed) for seed in plan.seeds)
    _make_datasets(one.full)
    step, given = one.storing({}), parsed(data_app, one.store(plan.work / "made"))
    assert [str(path) for path in given["datasets"]] == [part.path for part in one.full.cfg.data.parts]
    assert str(given["embedding"]) == str(one.experts["transformer"].run) and given["chunk"] == 32
    assert given["output"].parent == Path("made")
    assert given["overwrite"], "an attempt that was killed before its receipt has left a store there"
    assert plan.work / str(one.full.cfg.data.store) == step.output / given["output"].name
    assert step.output != other.storing({}).output and step.key != one.storing({"a": {"sha256": "1"}}).key
    _make_datasets(one.full, lookup="3 2 1")
    assert step.key != one.storing({}).key


def test_wishes_that_no_think_nano_has(tmp_path: Path, repository: Path) -> None:
    with pytest.raises(QuickstartError, match="no step evaluate"):
        plan_of(repository, work_dir=tmp_path, force=("evaluate",))
    (tmp_path / "one.toml").write_text("[rows]\n[dataset]\n[domains.only]\naddition = 1.0\n")
    with pytest.raises(QuickstartError, match="domains"):
        plan_of(repository, work_dir=tmp_path, settings=tmp_path / "one.toml")
