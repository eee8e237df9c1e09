"""Every report and export carries the one block of provenance; what its parts are."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vpmoe.config import config_hash
from megatron_vpmoe.profiling.__main__ import settings, work
from megatron_vpmoe.software import PACKAGES, provenance
from tests.tiny import ROOT, tiny_config
from vpmoe import steps
from vpmoe.eval.reports import write_report
from vpmoe.plan.report import plan_json
from vpmoe.quickstart.proof import Proof

KEYS = {"git", "config_hash", "tokenizer", "dataset_manifest_sha256", "packages", "hardware"}
# Rooms that report, and what marks a report in them: an entry "kind" of its own.
REPORTING = (
    *("vpmoe/eval", "vpmoe/ladder", "vpmoe/plan", "vpmoe/quickstart", "vpmoe/runs", "scripts/gpu"),
    "Megatron-vpmoe/megatron_vpmoe/profiling",
)


def whole(block: dict[str, Any]) -> bool:
    """Whether it is the block, with everything that is known everywhere."""
    found, packages = block["hardware"], block["packages"]
    return block.keys() >= KEYS and {"python", "torch"} <= packages.keys() and bool(found["cpu"] and found["cores"])


def reports_in(path: Path) -> Iterator[tuple[int, set[Any]]]:
    """Line and keys of each report that a file puts together."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Dict):
            entries = {k.value: v for k, v in zip(node.keys, node.values, strict=True) if isinstance(k, ast.Constant)}
            if "kind" in entries and getattr(entries["kind"], "attr", "") != "kind":  # a task's kind is no report's
                yield node.lineno, set(entries)


def test_every_report_has_the_block() -> None:
    found = {
        f"{path.relative_to(ROOT)}:{line}": "provenance" in keys
        for room in REPORTING
        for path in sorted((ROOT / room).rglob("*.py"))
        for line, keys in reports_in(path)
    }
    assert len(found) >= 8 and not [place for place, has_it in found.items() if not has_it]


def test_the_block(tmp_path: Path) -> None:
    block = provenance(config_hash="c", tokenizer={"name": "t"}, dataset=["a", "b"])
    assert whole(block) and set(block) == KEYS and json.loads(json.dumps(block)) == block
    assert block["dataset_manifest_sha256"] == ["a", "b"] and set(block["packages"]) <= {"python", *PACKAGES}
    write_report(tmp_path / "report.json", {"provenance": block})
    with pytest.raises(AssertionError, match="where it comes from"):
        write_report(tmp_path / "another.json", {})


def test_a_receipt_tells_what_its_maker_knows(tmp_path: Path) -> None:
    step = steps.Step("test", 1, tmp_path / "made", {}, packages=("pydantic",))
    receipt = steps.run(step, lambda _: {"origin": {"config_hash": "c", "dataset": "d"}, "told": 1})
    assert whole(receipt["provenance"]) and receipt["report"] == {"told": 1}
    assert (receipt["provenance"]["config_hash"], receipt["provenance"]["dataset_manifest_sha256"]) == ("c", "d")
    assert "pydantic" in receipt["provenance"]["packages"]


def test_a_plan(tmp_path: Path) -> None:
    cfg = tiny_config()
    block = plan_json(cfg, "tiny.yaml", [], [])["provenance"]
    assert whole(block) and block["config_hash"] == config_hash(cfg)


def test_the_report_of_several_runs(tmp_path: Path) -> None:
    """Each has a configuration and a dataset; a run that nobody evaluated has no word on its dataset."""
    cfg = tiny_config()
    told = {"kind": "eval_suite", "provenance": provenance(tokenizer={"name": "t"}, dataset="d" * 64)}
    (tmp_path / "teacher.json").write_text(json.dumps(told))
    runs: Any = {
        name: SimpleNamespace(cfg=cfg, work=tmp_path, evaluation=Path(f"{name}.json")) for name in ("teacher", "start")
    }
    asked: Any = SimpleNamespace(model_dump=dict)
    proof = Proof[Any]("rl_nano", {}, tmp_path, tmp_path, asked, (1,), (), overwrite=False, exempt=None)
    block = proof.report(runs, {}, {}, "a table", lambda path: path.touch())["provenance"]
    assert whole(block) and block["config_hash"] == dict.fromkeys(runs, config_hash(cfg))
    assert block["tokenizer"] == {"name": "t"} and block["dataset_manifest_sha256"] == {"teacher": "d" * 64}


def test_a_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is profiled."""
    monkeypatch.chdir(tmp_path)
    for name in ("initialize", "shutdown"):
        monkeypatch.setattr(f"megatron_vpmoe.runtime.distributed.{name}", lambda **_: None)
    found = {"tokens_per_second": 1.0, "step_ms": {"median": 1.0}, "split_ms": {}, "communication_ms": None}
    monkeypatch.setattr("megatron_vpmoe.profiling.capture.capture", lambda *_, **__: found)
    monkeypatch.setattr("megatron_vpmoe.profiling.capture.Subject", lambda _: None)
    cfg, wanted = tiny_config(), settings({"PROFILE_RUN": "tiny"}, [])
    work(wanted, cfg, tmp_path)
    (report,) = (tmp_path / "reports" / "perf").iterdir()
    block = json.loads(report.read_text())["provenance"]
    assert whole(block) and block["config_hash"] == config_hash(cfg)
