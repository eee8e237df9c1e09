"""Tensor- and sequence-parallel ranks train the model that one process trains: loss, gradients, norm, weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.distributed.tensor_parallel_steps import DENSE, GATED, MOE, QWEN3, Layout, train_all, train_steps, whole
from tests.workers import run_workers

NORMUON: dict[str, object] = {"optimizer": "normuon"}
STACKS = {
    "dense": DENSE,
    "qwen3": QWEN3,
    "moe": MOE,
    "dense normuon": {**DENSE, **NORMUON},
    "qwen3 normuon": {**QWEN3, **NORMUON},
    "moe normuon": {**MOE, **NORMUON},
    "gated moe normuon": {**GATED, **NORMUON},
}
ON_TWO = {
    "dense": (DENSE, Layout(tensor=2)),
    "dense, sequence": (DENSE, Layout(tensor=2, sequence=True)),
    "qwen3": (QWEN3, Layout(tensor=2)),
    "qwen3, sequence": (QWEN3, Layout(tensor=2, sequence=True)),
    "moe, sequence": (MOE, Layout(tensor=2, sequence=True)),
    "moe, sequence, expert": (MOE, Layout(tensor=2, sequence=True, expert=2)),
    "dense normuon": ({**DENSE, **NORMUON}, Layout(tensor=2)),
    "qwen3 normuon": ({**QWEN3, **NORMUON}, Layout(tensor=2)),
    "moe normuon, sequence, expert": ({**MOE, **NORMUON}, Layout(tensor=2, sequence=True, expert=2)),
    "gated moe normuon, sequence, expert": ({**GATED, **NORMUON}, Layout(tensor=2, sequence=True, expert=2)),
}
HALF = ({**MOE, "bf16": True}, Layout(tensor=2, sequence=True))
ON_FOUR = {
    "dense normuon": ({**DENSE, **NORMUON}, Layout(tensor=2)),
    "moe, sequence": (MOE, Layout(tensor=2, sequence=True)),
    "moe, sequence, expert": (MOE, Layout(tensor=2, sequence=True, expert=2)),
    "moe, sequence, all experts": (MOE, Layout(tensor=2, sequence=True, expert=4)),
}


@pytest.fixture(scope="module")
def references() -> dict[str, dict[str, Any]]:
    return {name: train_steps(fields, Layout()) for name, fields in STACKS.items()}


@pytest.fixture(scope="module")
def on_two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_workers(2, train_all, {**ON_TWO, "bf16": HALF}, folder=tmp_path_factory.mktemp("two"))


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_workers(4, train_all, ON_FOUR, folder=tmp_path_factory.mktemp("four"))


def assert_same(
    results: list[dict[str, Any]], layout: Layout, reference: dict[str, Any], *, looser: float = 1.0
) -> None:
    for result in results:
        assert result["records"] == results[0]["records"]
        assert result["held"][0] == result["held"][1], "parameters of a rank, and their estimate"
    for record, expected in zip(results[0]["records"], reference["records"], strict=True):
        assert record.keys() == expected.keys()
        for tag in expected:
            assert record[tag] == pytest.approx(expected[tag], rel=1e-5, abs=1e-7), tag
    start = whole([result["start"] for result in results], layout)
    assert all(torch.equal(start[name], expected) for name, expected in reference["start"].items())
    for what, tolerance in (("gradients", 1e-4), ("parameters", 1e-3)):
        joined = whole([result[what] for result in results], layout)
        assert joined.keys() == reference[what].keys()
        for name, expected in reference[what].items():
            change = expected if what == "gradients" else expected - reference["start"][name]
            largest = (joined[name] - expected).abs().max()
            assert largest <= looser * tolerance * change.abs().max() + 1e-8, (
                f"{what} of {name}: {largest} of {change.abs().max()}"
            )
    for result in results:
        for name, expected in reference["biases"].items():
            assert torch.equal(result["biases"][name], expected), name


def looser(case: str) -> float:
    """NorMuon gives the smallest directions of a gradient full size, rounding errors among them."""
    return 50.0 if "normuon" in case else 1.0


@pytest.mark.parametrize("case", ON_TWO)
def test_two_ranks(case: str, on_two: list[dict[str, Any]], references: dict[str, Any]) -> None:
    assert_same(
        [result[case] for result in on_two], ON_TWO[case][1], references[case.split(",")[0]], looser=looser(case)
    )


def test_two_ranks_in_bf16(on_two: list[dict[str, Any]], references: dict[str, Any]) -> None:
    """Sums in another order round otherwise; but what both ranks hold stays the same to the last bit."""
    results = [result["bf16"] for result in on_two]
    for record, expected in zip(results[0]["records"], references["moe"]["records"], strict=True):
        assert record["loss/total"] == pytest.approx(expected["loss/total"], rel=0.01)
        assert record["grad_norm"] == pytest.approx(expected["grad_norm"], rel=0.1)
    for what in ("gradients", "parameters"):
        joined = whole([result[what] for result in results], HALF[1])
        assert joined.keys() == references["moe"][what].keys()


@pytest.mark.parametrize("case", ON_FOUR)
def test_four_ranks_with_data_parallelism(case: str, on_four: list[dict[str, Any]], references: dict[str, Any]) -> None:
    assert_same(
        [result[case] for result in on_four], ON_FOUR[case][1], references[case.split(",")[0]], looser=looser(case)
    )
