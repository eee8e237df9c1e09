"""Reports of suites, written by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpmoe.eval.suites.suite_report import bootstrapped, items_file, means, shares

CHANCE = 0.25


def write_choices(path: Path, run: str, answers: Mapping[str, Sequence[bool]], **changes: Any) -> Path:
    """As CORE-8 writes: by task, whether each item was answered rightly; ``changes`` to the report."""
    items = [
        {"task": task, "item": place, "correct": right}
        for task, some in answers.items()
        for place, right in enumerate(some)
    ]
    tasks = {
        task: {**shares(sum(some), len(some), CHANCE), "chance": CHANCE, "cut": 0} for task, some in answers.items()
    }
    settings = {"items": 50, "seed": 1337, "context": None, "batch_size": 4, "bf16": False}
    report = {
        **_head(run, "core8", settings),
        "bundle": {task: {"file": f"{task}.jsonl", "sha256": "a"} for task in answers},
        "tasks": tasks,
        **means({"core8_centered_mean": tuple(answers)}, tasks, items),
    }
    return _write(path, {**report, **changes}, items)


def write_texts(path: Path, run: str, sums: Mapping[str, Sequence[tuple[float, int]]]) -> Path:
    """As the suite of likelihoods writes: by span, nats and bytes of each document."""
    items = [
        {"task": span, "item": place, "nats": nats, "tokens": 1, "bytes": size}
        for span, some in sums.items()
        for place, (nats, size) in enumerate(some)
    ]
    tasks: dict[str, Any] = {}
    for name in (*sums, "all"):
        some = [item for item in items if name in (item["task"], "all")]
        bits = sum(item["nats"] for item in some) / sum(item["bytes"] for item in some) / 0.6931471805599453
        count = len({item["item"] for item in some})
        tasks[name] = {"n": count, "bits_per_byte": bits, "interval": bootstrapped("bits_per_byte", name, items)}
    return _write(path, {**_head(run, "text", {"sha256": "a", "window": 8}), "tasks": tasks}, items)


def _head(run: str, suite: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    checkpoint = {"run": run, "name": run, "iteration": None, "weights_sha256": "0"}
    kind = {"schema_version": 1, "kind": "eval_suite", "suite": suite}
    return {**kind, "checkpoint": checkpoint, "settings": dict(settings)}


def _write(path: Path, report: Mapping[str, Any], items: Sequence[Mapping[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report))
    items_file(path).write_text("".join(json.dumps(item) + "\n" for item in items))
    return path
