"""Differences of two models: those of a plain loop over the same draws, and refused where nothing pairs."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.unit.vpmoe.eval.written_reports import CHANCE, write_choices, write_texts
from vpmoe.cli import main
from vpmoe.errors import DataError
from vpmoe.eval.suites.compare import differences
from vpmoe.eval.suites.finished import Finished


def flags(share: float, n: int, seed: int) -> list[bool]:
    generator = random.Random(seed)
    return [generator.random() < share for _ in range(n)]


def drawn(task: str, n: int, resamples: int, seed: int) -> list[list[int]]:
    generator = np.random.default_rng([seed, *task.encode()])
    return [[int(one) for one in generator.integers(0, n, n)] for _ in range(resamples)]


def interval_of(values: list[float]) -> list[float]:
    """Percentiles with linear interpolation, from their definition."""
    ordered, found = sorted(values), []
    for share in (0.025, 0.975):
        place = share * (len(ordered) - 1)
        below = math.floor(place)
        above = min(below + 1, len(ordered) - 1)
        found.append(ordered[below] + (place - below) * (ordered[above] - ordered[below]))
    return found


def test_choices_as_a_plain_loop_has_them(tmp_path: Path) -> None:
    answers = {name: [flags(share, 30, seed) for seed in (1, 2)] for name, share in (("easy", 0.7), ("hard", 0.4))}
    former, later = (
        Finished.read(
            write_choices(tmp_path / f"{at}.json", str(at), {name: both[at] for name, both in answers.items()})
        )
        for at in (0, 1)
    )
    found = differences(former, later, resamples=300, seed=5)
    loops = {}
    for name, (one, other) in answers.items():
        loops[name] = [sum(other[at] - one[at] for at in draw) / 30 for draw in drawn(name, 30, 300, 5)]
        assert found[name].value == pytest.approx((sum(other) - sum(one)) / 30)
        assert found[name].interval == pytest.approx(interval_of(loops[name]), abs=1e-12)
        assert found[name].n == 30 and found[name].differing == sum(map(bool.__ne__, one, other))
    mean = [sum(pair) / 2 / (1 - CHANCE) for pair in zip(*loops.values(), strict=True)]
    assert found["core8_centered_mean"].interval == pytest.approx(interval_of(mean), abs=1e-12)
    expected = sum(one.value for name, one in found.items() if name in answers) / 2 / (1 - CHANCE)
    assert found["core8_centered_mean"].value == pytest.approx(expected)


def test_bits_per_byte_as_a_plain_loop_has_them(tmp_path: Path) -> None:
    """Of all spans together it is a document that is drawn, not a span of one."""
    generator = random.Random(0)
    sums = [
        {
            span: [(generator.uniform(1, 9), generator.randint(3, 9)) for _ in range(12)]
            for span in ("analysis", "final")
        }
        for _ in range(2)
    ]
    former, later = (Finished.read(write_texts(tmp_path / f"{at}.json", str(at), one)) for at, one in enumerate(sums))
    found = differences(former, later, resamples=200)
    assert found.keys() == {"analysis", "final", "all"}
    for name, spans in (("final", ["final"]), ("all", ["analysis", "final"])):
        loop = []
        for draw in drawn(name, 12, 200, 1337):
            bits = []
            for one in sums:
                picked = [one[span][at] for span in spans for at in draw]
                bits.append(sum(nats for nats, _ in picked) / sum(size for _, size in picked) / math.log(2))
            loop.append(bits[1] - bits[0])
        assert found[name].interval == pytest.approx(interval_of(loop), abs=1e-9)
    assert found["all"].n == 12


@pytest.mark.parametrize(
    ("gained", "lost", "verdict"),
    [(0, 0, "noise"), (5, 0, "noise"), (8, 0, "better"), (0, 8, "worse"), (8, 7, "noise"), (20, 4, "better")],
)
def test_what_exceeds_noise(gained: int, lost: int, verdict: str, tmp_path: Path) -> None:
    """Five of fifty items, all gained, would be called a gain by the bootstrap, and are p = 0.06 by the sign test."""
    one = [False] * gained + [True] * lost + [True] * (50 - gained - lost)
    other = [True] * gained + [False] * lost + [True] * (50 - gained - lost)
    pair = [
        Finished.read(write_choices(tmp_path / f"{name}.json", name, {"task": some}))
        for name, some in (("a", one), ("b", other))
    ]
    found = differences(pair[0], pair[1])
    assert found["task"].verdict == found["core8_centered_mean"].verdict == verdict
    assert found["task"].differing == gained + lost
    assert differences(pair[0], pair[1]) == found


def test_the_command_names_what_only_one_has(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = write_choices(tmp_path / "a.json", "a", {"x": flags(0.1, 60, 1), "y": flags(0.5, 60, 2)})
    b = write_choices(tmp_path / "b.json", "b[red]", {"x": flags(0.9, 60, 3)})
    assert main(["eval", "compare", str(a), str(b)]) == 0
    told = capsys.readouterr().out
    assert "better" in told and "b[red]" in told and "in A only: y, core8_centered_mean" in told.replace("\n", " ")


def change(name: str, **values: Any) -> Callable[[dict], None]:
    return lambda report: report[name].update(values)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda report: report.update(suite="text"), "one report is of core8, the other of text"),
        (change("settings", seed=1), "settings.seed differs: 1337, 1"),
        (change("settings", new=1), "settings.new differs: None, 1"),
        (change("bundle", x={"sha256": "b"}), "bundle.x.sha256 differs"),
        (change("bundle", x={"sha256": "a", "shots": 3}), "bundle.x.shots differs: None, 3"),
        (change("bundle", x={"sha256": "a", "file": "elsewhere.jsonl"}), None),
        (lambda report: (report["tasks"]["x"].update(cut=1), report["settings"].update(context=9)), "settings.context"),
        (lambda report: report.update(tasks={"z": {"accuracy": 0.5, "n": 0}}, means={}), "no task of one report"),
        (change("settings", batch_size=9, bf16=True, context=99), None),
    ],
)
def test_what_cannot_be_paired_is_refused_by_name(edit: Callable, told: str | None, tmp_path: Path) -> None:
    former = Finished.read(write_choices(tmp_path / "a.json", "a", {"x": flags(0.5, 9, 1)}))
    path = write_choices(tmp_path / "b.json", "b", {"x": flags(0.5, 9, 2)})
    report = json.loads(path.read_text())
    edit(report)
    path.write_text(json.dumps(report))
    if told is None:
        assert differences(former, Finished.read(path))
        return
    with pytest.raises(DataError, match=told) as error:
        differences(former, Finished.read(path))
    assert "a.json" in str(error.value) and "b.json" in str(error.value)


def test_of_one_context_a_cut_item_hinders_no_comparison(tmp_path: Path) -> None:
    """Another vocabulary has longer prompts: at the same context both were asked all that they could read."""
    pair = []
    for name, cut in (("a", 0), ("b", 1)):
        path = write_choices(tmp_path / f"{name}.json", name, {"x": flags(0.5, 9, 1 + cut)})
        report = json.loads(path.read_text())
        report["settings"]["context"], report["tasks"]["x"]["cut"] = 9, cut
        path.write_text(json.dumps(report))
        pair.append(Finished.read(path))
    assert differences(*pair).keys() == differences(*reversed(pair)).keys() == {"x", "core8_centered_mean"}


def test_other_items_are_refused(tmp_path: Path) -> None:
    former = Finished.read(write_choices(tmp_path / "a.json", "a", {"x": [True] * 9}))
    later = write_choices(tmp_path / "b.json", "b", {"x": [True] * 10})
    with pytest.raises(DataError, match="1 items of x are in one report only, such as 9"):
        differences(former, Finished.read(later))
    later.with_suffix(".items.jsonl").unlink()
    with pytest.raises(DataError, match="no items beside"):
        differences(former, Finished.read(later))
