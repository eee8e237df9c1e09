"""``scripts/gpu_check.sh``: a dry run of all that a GPU machine runs, and what becomes of sections that go wrong."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_vpmoe.files import read_json
from megatron_vpmoe.model.moe.expert_rows import GroupedRows
from megatron_vpmoe.model.moe.narrow_rows import Float8Rows
from megatron_vpmoe.model.output.terms import Term
from megatron_vpmoe.optim.normuon import NorMuon
from scripts.bench.attention import Layer
from scripts.gpu import attention, designs, loss, report
from scripts.gpu.__main__ import LONGEST_S, main
from scripts.gpu.experts import Product
from scripts.gpu.frame import Findings, Numbers, Section, perform
from scripts.gpu.sections import SECTIONS
from tests.unit.vpmoe.test_provenance_blocks import whole


def nothing(section: str) -> Numbers:
    raise KeyError(section)


def performed(run: Callable[[Findings], None], tmp_path: Path, budget_s: int = 60) -> tuple[dict, list[str]]:
    told: list[str] = []
    section = Section("one", "a section", budget_s, run, decides=True)
    return perform(section, Findings(told.append, True, nothing, tmp_path)), told


@pytest.mark.slow
def test_a_dry_run_finds_what_a_cpu_computes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every section runs, every comparison holds, and the report says so and what it was run on."""
    assert main(["--dry-run", "--output", str(tmp_path)]) == 0
    told = capsys.readouterr().out
    assert "sdpa in the place of flex" in told
    found = read_json(tmp_path / "gpu_dry-run.json")
    assert whole(found["provenance"])
    assert found["kind"] == "gpu_check" and found["dry_run"] and found["passed"] and found["left"] == []
    assert [each["name"] for each in found["sections"]] == [section.name for section in SECTIONS]
    for each, section in zip(found["sections"], SECTIONS, strict=True):
        assert each["status"] == ("passed" if section.decides else "measured"), each
        assert bool(each["checks"]) == section.decides and bool(each["rows"]) != section.decides
    table = (tmp_path / "gpu_dry-run.md").read_text()
    assert all(f"## {section.name}" in table for section in SECTIONS)
    assert (tmp_path / "gpu_check" / "trace.json.gz").exists()


def test_a_section_that_goes_wrong_is_told_and_ends_alone(tmp_path: Path) -> None:
    def differs(findings: Findings) -> None:
        findings.compare("card", {"a": torch.ones(3)}, {"a": torch.full((3,), 2.0)}, 0.1)

    def diverges(findings: Findings) -> None:
        findings.check("loss", float("nan"), 0.1)

    def raises(findings: Findings) -> None:
        findings.check("loss", 0.0, 0.1)
        raise torch.OutOfMemoryError("tried to allocate 2 GiB\nmore")

    def hangs(findings: Findings) -> None:
        try:
            time.sleep(30)
        except Exception:
            findings.note("took it for a failure of its own")

    entry, told = performed(differs, tmp_path)
    assert entry["status"] == "failed" and told == ["FAILED card, worst in a: 5.00e-01 (limit 0.1)"]
    entry, _ = performed(diverges, tmp_path)
    assert entry["status"] == "failed" and entry["checks"][0]["error"] is None
    json.dumps(entry, allow_nan=False)
    entry, _ = performed(raises, tmp_path)
    assert (entry["status"], entry["died"]) == ("died", "out of memory: tried to allocate 2 GiB")
    begin = time.monotonic()
    entry, _ = performed(hangs, tmp_path, budget_s=1)
    assert entry["status"] == "died" and "1 s were over" in entry["died"] and time.monotonic() - begin < 10
    assert entry["notes"] == []


def test_a_case_that_dies_ends_alone(tmp_path: Path) -> None:
    def cases(findings: Findings) -> None:
        for number in range(3):
            with findings.case(f"case {number}"):
                if number == 1:
                    raise RuntimeError("no such kernel\nand more")
                findings.check(f"case {number}", 0.0, 0.1)

    entry, _ = performed(cases, tmp_path)
    assert [check["name"] for check in entry["checks"]] == ["case 0", "case 2"]
    assert entry["status"] == "died" and entry["died"].startswith("case 1: RuntimeError: no such kernel (")


def test_what_a_machine_does_not_have_is_no_failure(tmp_path: Path) -> None:
    entry, told = performed(lambda findings: findings.skip("mxfp8", "no torchao"), tmp_path)
    assert entry["status"] == "skipped" and report.passed([entry]) and told == ["mxfp8: not here: no torchao"]
    entry, _ = performed(lambda findings: None, tmp_path)
    assert not report.passed([entry]), "it should have compared something"


def wider_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """One key too many in a local layer."""
    right = attention.core_attention

    def wrong(*args: Any, window: int | None, **named: Any) -> Tensor:
        return right(*args, window=window and window + 1, **named)

    monkeypatch.setattr(attention, "core_attention", wrong)


def garbage_of_idle_experts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight gradients of experts without a token are what was in memory."""
    right = GroupedRows.outer

    def wrong(self: GroupedRows, left: Tensor, rows: Tensor) -> Tensor:
        out = right(self, left, rows)
        out[~out.any(-1).any(-1)] = 0.5
        return out

    monkeypatch.setattr(GroupedRows, "outer", wrong)


def scales_of_another_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is narrowed by an expert's scales is widened by its neighbour's."""
    right = Float8Rows._emulated_by_expert

    def wrong(self: Float8Rows, rows: Tensor) -> Tensor:
        own = self._expert_P
        self._expert_P = (own + 1) % self._experts
        try:
            return right(self, rows)
        finally:
            self._expert_P = own

    monkeypatch.setattr(Float8Rows, "_emulated_by_expert", wrong)


def loss_of_all_but_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last token is left out."""
    right = loss.weighted_sum

    def but_the_last(term: Term) -> Term:
        return replace(term, **{name: of[:-1] for name, of in vars(term).items() if isinstance(of, Tensor)})

    monkeypatch.setattr(
        loss,
        "weighted_sum",
        lambda hidden, projection, terms: right(hidden[:-1], projection, list(map(but_the_last, terms))),
    )


def no_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weight decay is forgotten."""
    right = NorMuon.__init__
    monkeypatch.setattr(NorMuon, "__init__", lambda self, params, lr, _, **named: right(self, params, lr, 0.0, **named))


def forgotten_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A resume takes the weights alone."""
    right = designs.checkpoint.load
    monkeypatch.setattr(designs.checkpoint, "load", lambda found, model, *_: right(found, model))


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("attention", wider_window),
        ("experts", garbage_of_idle_experts),
        ("narrow", scales_of_another_expert),
        ("loss", loss_of_all_but_one),
        ("optimizer", no_decay),
        ("resume", forgotten_optimizer),
    ],
)
def test_a_fault_is_found(
    name: str, fault: Callable[[pytest.MonkeyPatch], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Faults of kernels and of what carries a run on, each in what the card would compute alone."""
    section = next(each for each in SECTIONS if each.name == name)
    numbers = section.numbers(True) if section.numbers else {}
    fault(monkeypatch)
    entry = perform(section, Findings(lambda _: None, True, lambda _: numbers, tmp_path))
    assert entry["status"] == "failed" and entry["died"] is None, entry


def test_the_exit_code_hangs_on_comparisons_alone() -> None:
    passed, died = ({"status": status, "decides": True} for status in ("passed", "died"))
    assert report.passed([passed, {"status": "died", "decides": False}])
    assert not report.passed([passed, died]) and not report.passed([{"status": "failed", "decides": True}])


def test_budgets_leave_time_for_the_start() -> None:
    assert sum(section.budget_s for section in SECTIONS) <= LONGEST_S - 30 and LONGEST_S == 8 * 60
    assert all(section.decides for section in SECTIONS if section.numbers is not None)
    assert [section.decides for section in SECTIONS] == sorted((s.decides for s in SECTIONS), reverse=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="what is said where there is no GPU")
def test_without_a_gpu_it_says_what_runs_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "no GPU" in (told := capsys.readouterr().err) and "--dry-run" in told


def test_refusals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", "--only", "speed"]) == 2
    assert "attention-speed" in capsys.readouterr().err
    (tmp_path / "gpu_dry-run.json").write_text('{"mine": 1}')
    assert main(["--dry-run", "--output", str(tmp_path), "--overwrite"]) == 2
    assert "NotOursError" in capsys.readouterr().err
    (tmp_path / "gpu_dry-run.json").write_text('{\n  "kind": "gpu_check"\n}')
    assert main(["--dry-run", "--output", str(tmp_path)]) == 2
    assert "--overwrite replaces it" in capsys.readouterr().err
    assert main(["--list"]) == 0
    listed = capsys.readouterr().out
    assert all(section.name in listed for section in SECTIONS)


def test_formulas() -> None:
    """Bytes of a product are those of its tensors; of many rows it has 114 FLOP a byte; pairs in sight are counted."""
    rows, left, right, experts = 12, 6, 4, 3
    product = Product(rows, left, right, experts)
    tensors = [
        torch.empty(shape, dtype=torch.bfloat16) for shape in ((rows, left), (rows, right), (experts, left, right))
    ]
    assert product.moved == sum(x.nbytes for x in tensors) and product.flops == 2 * rows * left * right
    wide = Product(10**9, 1024, 128, 1)
    assert wide.flops / wide.moved == pytest.approx(113.8, abs=0.1)
    layer = Layer(seq=50, batch=1, heads=2, dim=8, window=7)
    assert layer.useful_flops == 7 * 2 * 2 * 8 * sum(min(i + 1, 7) for i in range(50))
    assert layer.causal_flops == Layer(seq=50, batch=1, heads=2, dim=8, window=0).useful_flops == 7 * 2 * 2 * 8 * 1275
