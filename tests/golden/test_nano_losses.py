"""Nano runs of thirty steps give the stored losses, and with a constant changed they do not; twice they are one run."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import training_runs
from tests.golden.nano_losses import (
    MUTATIONS,
    ROUTING,
    RUNS,
    Readings,
    deviations,
    finished,
    load,
    mutated,
    readings,
    started,
)
from tests.mini_dataset import write_mini

pytestmark = pytest.mark.slow
IN_THE_SUITE = (
    "model: GRAPE-M's scale of log frequencies 16 to 15",
    "model: window 8 to 9",
    "model: initial deviation 0.02 to 0.0201",
    "model: scaling factor of the experts 2.5 to 2.49",
    "router: bias rate 1e-3 to 1.1e-3",
    "optimizer: NorMuon's momentum 0.95 to 0.94",
    "optimizer: NorMuon's beta2 0.95 to 0.9",
    "optimizer: first coefficient of Polar Express, 0.1 % more",
    "optimizer: weight decay 0.01 to 0.02",
    "schedule: cosine to linear",
    "objective: weight of the answer 0.2 to 0.201",
    "data: packing among 8 conversations, not 4,096",
)
"""The others are in ``python scripts/golden_losses.py --mutations``."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mini(tmp_path_factory.mktemp("mini")) / "dataset"


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory: pytest.TempPathFactory, dataset: Path) -> dict[str, Path]:
    """Runs that also validate and tell of each layer, which moves nothing."""
    folder, more = tmp_path_factory.mktemp("runs"), {"eval_interval": 10, "moe_per_layer_logging": True}
    for run in [started(of, folder / of, dataset, **more) for of in RUNS]:
        done = run.finish()
        assert done.returncode == 0, done.stdout + done.stderr
    return {of: folder / of for of in RUNS}


@pytest.mark.parametrize("of", RUNS)
def test_the_losses_are_those_that_are_stored(of: str, run_dirs: dict[str, Path]) -> None:
    stored = load()[of]
    found = deviations(readings(run_dirs[of]), stored)
    told = "\n".join(map(str, found[:12]))
    assert not found, f"{len(found)} deviate:\n{told}\nmeant? python scripts/golden_losses.py --renew, and say why"
    assert stored["loss/total"][-1] < 0.8 * stored["loss/total"][0]  # what is stored is of a run that learns


def test_every_constant_that_is_changed_is_seen(dataset: Path) -> None:
    unseen = [name for name, found in mutated(IN_THE_SUITE, dataset) if not found]
    assert not unseen
    assert len({name.split(":")[0] for name in IN_THE_SUITE}) == len({name.split(":")[0] for name in MUTATIONS}) == 6


def test_a_deterministic_run_repeats_bit_for_bit(tmp_path: Path, dataset: Path) -> None:
    """Every number and every tensor of the checkpoint; also beside other settings of what is no arithmetic."""
    runs = {"one": {}, "two": {}, "saving beside": {"async_save": False, "log_interval": 4}}
    begun = {
        name: started("vpmoe", tmp_path / name, dataset, 8, deterministic=True, **changes)
        for name, changes in runs.items()
    }
    read = {name: finished(run, tmp_path / name) for name, run in begun.items()}
    assert read["one"] == read["two"] and len(read["one"]["loss/total"]) == 8
    assert {tag: values[3::4] for tag, values in read["one"].items()} == read["saving beside"]
    one, *others = (training_runs.checkpoint_tensors(tmp_path / name / "checkpoints" / "iter_0000008") for name in runs)
    assert len(one) > 50 and all((tensors[key] == value).all() for tensors in others for key, value in one.items())
    assert not deviations(read["one"], load()["vpmoe"])  # another order of sums at the most


def documented(repository: Path) -> list[re.Pattern[str]]:
    """The tags in the tables of docs/metrics.md, ``{a,b}`` spelled out and ``<name>`` standing for anything."""
    rows = re.findall(r"^\|((?: *`[^`]+`,?)+) *\|", (repository / "docs" / "metrics.md").read_text(), re.MULTILINE)

    def spelled(tag: str) -> Iterator[str]:
        parts = [part.split(",") for part in re.split(r"[{}]", tag)]
        return map("".join, itertools.product(*parts))

    tags = [each for row in rows for tag in re.findall("`([^`]+)`", row) for each in spelled(tag)]
    return [re.compile(re.sub("<[^>]+>", "[^/].*", re.sub(r"[.]", r"\\.", tag))) for tag in tags]


def test_every_tag_of_a_run_is_documented(run_dirs: dict[str, Path], repository: Path) -> None:
    tags, known = {record["tag"] for record in training_runs.records(run_dirs["vpmoe"])}, documented(repository)
    assert not sorted(tag for tag in tags if not any(each.fullmatch(tag) for each in known))
    wanted = {"ms/forward", "ms/backward", "ms/optimizer", "ms/data", "ms/saving", "memory/peak_gib", "lr/router"}
    wanted |= {"ms/evaluation/valid", "throughput/seconds_waiting", "moe/router_agg/max_vio"}
    assert wanted | {"update_ratio/expert_matrices", "grad_norm/embedding", "param_norm/norm_scales"} <= tags


def readings_with(stored: Readings, tag: str, step: int, factor: float) -> Readings:
    return {**stored, tag: [value * (factor if n == step - 1 else 1) for n, value in enumerate(stored[tag])]}


def test_what_is_compared_and_how_closely() -> None:
    stored = load()["vpmoe"]
    assert not deviations(stored, stored)
    assert not deviations(readings_with(stored, "loss/total", 9, 1 + 1e-6), stored)
    (found,) = deviations(readings_with(stored, "loss/total", 9, 1 + 1e-5), stored)
    assert (found.step, found.tag) == (9, "loss/total")
    moved = readings_with(stored, ROUTING, 5, 1 + 1e-6)  # a token that went elsewhere
    assert not deviations(readings_with(moved, "loss/total", 9, 1 + 1e-4), stored)
    assert deviations(readings_with(moved, "loss/total", 4, 1 + 1e-4), stored)
    assert deviations(readings_with(moved, "loss/total", 9, 1 + 1e-2), stored)
    fewer = {tag: values for tag, values in stored.items() if tag != "lr/router"}
    assert [found.tag for found in deviations(fewer, stored)] == ["lr/router"]
