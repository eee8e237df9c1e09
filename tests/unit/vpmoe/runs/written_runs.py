"""Runs as the trainer leaves them, without training: their rows in a store and their metrics."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from megatron_vpmoe.config import load_config
from megatron_vpmoe.metrics import JsonlSink, Record, RunStoreSink
from megatron_vpmoe.metrics.run_store import identify, json_text, opened_store, put_row, written_directory

CONFIG: dict[str, dict[str, Any]] = {
    "model": {"num_layers": 4},
    "optim": {"lr": 0.01},
    "training": {"run_name": "", "run_dir": None, "train_iters": 100},
}


def write_run(
    store: Path,
    name: str,
    *,
    steps: int = 100,
    loss: Callable[[int], float] = lambda step: 1 / step,
    tokens_per_step: int | None = 10,
    started: float = 1000.0,
    changes: dict[str, Any] | None = None,
    **row: Any,
) -> Path:
    """A finished run beside the store; returns its directory.

    Args:
        changes: fields of the section optim.
        row: columns of its row in the store.
    """
    directory = store.parent / name
    config = {**CONFIG, "optim": {**CONFIG["optim"], **(changes or {})}}
    config["training"] = {**config["training"], "run_name": name}
    log = JsonlSink(directory / "metrics.jsonl")
    for step in range(1, steps + 1):
        place = [] if tokens_per_step is None else [Record(step, "elapsed/tokens", step * tokens_per_step)]
        place += [] if tokens_per_step is None else [Record(step, "elapsed/seconds", step / 2)]
        log.write([*place, Record(step, "loss/total", loss(step)), Record(step, "lr", 0.01)])
    log.close()
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    (directory / ".lock").touch()
    provenance = {"git": {"sha": f"of {name}", "dirty": False}, "config_hash": name, "packages": {"torch": "2"}}
    with opened_store(store) as connection:
        facts = {
            **{"name": name, "experiment": "tests", "directory": written_directory(store, directory)},
            **{"status": "finished", "started": started, "ended": started + 60, "step": steps, "host": "h", "pid": 1},
            **{"world_size": 1, "config": json.dumps(config), "provenance": json.dumps(provenance)},
            "results": json_text({"loss/total": loss(steps)}),
        }
        put_row(connection, "runs", {"id": identify(connection, store, directory), **facts, **row}, "id")
    return directory


def register_runs(config: Path, folder: Path, runs: int, number: int) -> None:
    """One of several processes, by ``number``, that each keep ``runs`` runs of three steps in the one store."""
    cfg = load_config(config, ["--train-iters=3", "--lr-warmup-iters=1"])
    for each in range(runs):
        directory = folder / f"{number}_{each}"
        directory.mkdir()
        sink = RunStoreSink(cfg, directory, provenance={}, step=0, world_size=1)
        for step in (1, 2, 3):
            sink.write([Record(step, "loss/total", float(step))])
            sink.sync()
        sink.close()
