"""Two datasets compared, against counts taken by hand from their files."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from conftest_dataset import ROWS
from typer.testing import CliRunner

from megatron_vpmoe.token_files import read_triple
from vpmoe.data_curation.app import app
from vpmoe.data_curation.checks.sample import histogram, quantile, sample_split
from vpmoe.data_curation.checks.stats import QUANTILES, compare, log_likelihood
from vpmoe.data_curation.conversations.convert import convert
from vpmoe.data_curation.conversations.synth import resolve_synth
from vpmoe.data_curation.datasets.kd import build
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.manifest import read_manifest
from vpmoe.data_curation.tasks import synth_mini
from vpmoe.errors import DataError
from vpmoe.harmony.prompts import Prompts
from vpmoe.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def other_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Other families with another vocabulary."""
    folder = tmp_path_factory.mktemp("other")
    synth_mini.generate(folder / "rows", rows=120, seed=1, families={"dates": 1.0, "lookup": 1.0}, languages=("de",))
    convert(
        resolve_synth(str(folder / "rows")), folder / "chat", num_shards=1, prompts=Prompts(developer_instructions=None)
    )
    build(folder / "chat", folder / "other", BuildOptions(seq_len=400, valid_fraction=0.05), quiet=True)
    return folder / "other"


def counted(folder: Path) -> tuple[list[int], Counter[bytes]]:
    lengths, pieces = [], load_tokenizer(folder).pieces()
    counts: Counter[bytes] = Counter()
    for shard in read_manifest(folder)["splits"]["train"]["shards"]:
        triple = read_triple(folder / "train", shard["name"])
        lengths += triple.lengths.tolist()
        counts.update(pieces[token] for token in triple.tokens)
    return lengths, counts


def test_the_figures_are_those_of_the_files(dataset_dir: Path, other_dir: Path) -> None:
    compared = compare(dataset_dir, other_dir, top=5)
    (lengths_a, a), (lengths_b, b) = counted(dataset_dir), counted(other_dir)
    for dataset, lengths in zip(compared["datasets"], (lengths_a, lengths_b), strict=True):
        assert dataset["rows"] == dataset["documents_read"] == len(lengths) and dataset["tokens"] == sum(lengths)
        shown = dataset["lengths"]["all"]
        assert (shown["min"], shown["max"]) == (min(lengths), max(lengths))
        assert shown["p50"] == pytest.approx(np.median(lengths), abs=0.06)
        assert sum(dataset["span_shares"].values()) == pytest.approx(1)
    vocabulary = compared["vocabulary"]
    assert vocabulary["both"] == len(a.keys() & b.keys())
    assert vocabulary["only_first"] == len(a.keys() - b.keys())
    assert vocabulary["only_second"] == len(b.keys() - a.keys())
    assert vocabulary["overlap"] == pytest.approx(len(a.keys() & b.keys()) / len(a.keys() | b.keys()))
    assert vocabulary["covered_second"] == pytest.approx(sum(n for t, n in b.items() if t in a) / b.total())
    assert len(compared["differing_tokens"]) == 5
    for entry in compared["differing_tokens"]:
        piece = entry["token"].encode()
        assert (entry["first"], entry["second"]) == pytest.approx((a[piece] / a.total(), b[piece] / b.total()))


def test_a_dataset_does_not_differ_from_itself(dataset_dir: Path) -> None:
    compared = compare(dataset_dir, dataset_dir)
    assert compared["vocabulary"]["overlap"] == compared["vocabulary"]["covered_first"] == 1
    assert compared["differing_tokens"] == []


def test_log_likelihood_by_hand() -> None:
    # 10 of 100 against 30 of 300 is no surprise; 5 of 100 against none of 300 is.
    a, b = np.array([10, 5, 85]), np.array([30, 0, 270])
    found = log_likelihood(a, b)
    assert found[0] == pytest.approx(0) and found[1] == pytest.approx(2 * 5 * np.log(4))


def test_a_sample_is_spread_over_the_shards(dataset_dir: Path) -> None:
    manifest = read_manifest(dataset_dir)
    whole, part = (sample_split(dataset_dir, manifest, "train", limit) for limit in (0, 50))
    lengths, _ = counted(dataset_dir)
    assert whole.read == len(lengths) == manifest["splits"]["train"]["rows"] > 0.9 * ROWS
    assert part.lengths["all"] == Counter(lengths[:: -(-whole.read // 50)])
    assert part.described.startswith(f"{part.read} of ")
    assert whole.token_counts.sum() == manifest["splits"]["train"]["tokens"] == sum(whole.lengths["all"].elements())
    assert sum(whole.lengths["analysis"].elements()) == manifest["splits"]["train"]["span_tokens"]["analysis"]
    for share in QUANTILES.values():
        assert quantile(whole.lengths["all"], share) == pytest.approx(np.quantile(lengths, share))


def test_bars_hold_every_length() -> None:
    bars = histogram(Counter([3, 3, 4, 9, 20]), 4)
    assert [(bar.low, bar.high, bar.count) for bar in bars] == [(3, 7, 3), (8, 12, 1), (13, 17, 0), (18, 22, 1)]
    assert histogram(Counter(), 4) == [] and quantile(Counter(), 0.5) is None


def test_the_command_prints_tables_or_json(dataset_dir: Path, other_dir: Path) -> None:
    words = ["stats", str(dataset_dir), str(other_dir), "--split", "valid", "--top", "3"]
    shown = CliRunner().invoke(app, words)
    assert shown.exit_code == 0 and "tokens that differ most" in shown.output and "share of final" in shown.output
    assert json.loads(CliRunner().invoke(app, [*words, "--json"]).output) == compare(
        dataset_dir, other_dir, split="valid", top=3
    )


@pytest.mark.parametrize(("words", "named"), [(["--split", "test"], "test"), (["--sample", "-1"], "-1 documents")])
def test_what_can_not_be_compared_is_named(dataset_dir: Path, words: list[str], named: str) -> None:
    result = CliRunner().invoke(app, ["stats", str(dataset_dir), str(dataset_dir), *words])
    assert isinstance(result.exception, DataError) and named in str(result.exception)
