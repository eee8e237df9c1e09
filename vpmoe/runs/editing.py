"""What a person changes of a registry: tags, notes, runs that came from elsewhere, entries that go."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from megatron_vpmoe.metrics.jsonl import METRICS
from megatron_vpmoe.metrics.run_store import (
    LOCK,
    experiment_of,
    found_directory,
    identify,
    json_text,
    opened_store,
    put_row,
    store_path,
    written_directory,
)
from megatron_vpmoe.ownership import owned
from megatron_vpmoe.software import is_provenance
from vpmoe.errors import DataError
from vpmoe.runs.registry import RunEntry, find_run

_LONGEST_TAG = 100


def tag(run: RunEntry, tags: Sequence[str], store: Path | None = None) -> None:
    """Put tags on a run; those it has already stay.

    Raises:
        DataError: a tag is empty, very long, or holds a comma or blank.
    """
    for each in tags:
        if (
            not each
            or len(each) > _LONGEST_TAG
            or "," in each
            or any(not sign.isprintable() or sign.isspace() for sign in each)
        ):
            raise DataError(f"{each!r} is no tag", source="the tag", remedy="one word without comma")
    _edit(run, store, "INSERT OR IGNORE INTO tags (run, tag) VALUES (?, ?)", [(run.id, each) for each in tags])


def untag(run: RunEntry, tags: Sequence[str], store: Path | None = None) -> None:
    """Take tags off a run.

    Raises:
        DataError: it does not have one of them.
    """
    if lacking := [each for each in tags if each not in run.tags]:
        has = ", ".join(run.tags) or "none"
        raise DataError(f"{run.name} has no tag {lacking[0]!r}", source=run.id, remedy=f"its tags: {has}")
    _edit(run, store, "DELETE FROM tags WHERE run = ? AND tag = ?", [(run.id, each) for each in tags])


def note(run: RunEntry, text: str, store: Path | None = None) -> None:
    """Give a run a note in place of its former one; an empty text takes it away."""
    _edit(run, store, "UPDATE runs SET note = ? WHERE id = ?", [(text.strip(), run.id)])


def forget(run: RunEntry, store: Path | None = None) -> None:
    """Remove a run's entry, with its tags and note; its directory stays."""
    _edit(run, store, "DELETE FROM runs WHERE id = ?", [(run.id,)])


def _edit(run: RunEntry, store: Path | None, statement: str, rows: list[tuple[str, ...]]) -> None:
    with opened_store(store_path(store)) as connection:
        if connection.execute("SELECT 1 FROM runs WHERE id = ?", (run.id,)).fetchone() is None:
            raise DataError(
                f"the run {run.id} is gone meanwhile", source=str(store_path(store)), remedy="vpmoe runs list"
            )
        connection.executemany(statement, rows)


def add(directory: Path, store: Path | None = None) -> RunEntry:
    """Register a run's directory that the store does not know: of another machine, older than the store, or moved.

    The directory gets an identity if it has none. Of when and where it ran only what its files tell is known.

    Raises:
        DataError: it is no run's directory, or the store knows it already.
        BusyError: it is at work; it registers itself.
    """
    path, configuration, metrics = store_path(store), directory / "config.yaml", directory / METRICS
    remedy = "name the directory of a run: it holds config.yaml and metrics.jsonl"
    config = _configuration(configuration, remedy)
    if not metrics.is_file():
        raise DataError("no run has left its metrics here", source=str(metrics), remedy=remedy)
    with owned(directory / LOCK, f"the run directory {directory}"):
        found = _row(path, directory, config)  # before the store is held up
        run = _registered(path, directory, found)
    return find_run(run, store)


def _registered(path: Path, directory: Path, found: dict[str, object]) -> str:
    with opened_store(path) as connection:
        run = identify(connection, path, directory)
        row = connection.execute("SELECT directory FROM runs WHERE id = ?", (run,)).fetchone()
        if row is None:
            put_row(connection, "runs", {"id": run, **found}, "id")
        elif found_directory(path, row[0], run) is not None:
            raise DataError("the store knows this run", source=str(directory), remedy=f"vpmoe runs show {run}")
        else:  # it was moved
            here = written_directory(path, directory)
            connection.execute("UPDATE runs SET directory = ? WHERE id = ?", (here, run))
    return run


def _configuration(path: Path, remedy: str) -> dict[str, dict[str, Any]]:
    try:
        config = yaml.safe_load(path.read_bytes())
    except (OSError, yaml.YAMLError, RecursionError) as error:
        raise DataError(f"no run's configuration can be read here: {error}", source=str(path), remedy=remedy) from error
    sections = config if isinstance(config, dict) else {}
    training = sections.get("training")
    named = (
        isinstance(training, dict)
        and isinstance(training.get("run_name"), str)
        and type(training.get("train_iters")) is int
    )
    if not (named and all(isinstance(values, dict) for values in sections.values()) and _is_json(sections)):
        raise DataError("this is no resolved configuration of a run", source=str(path), remedy=remedy)
    return sections


def _is_json(value: Any) -> bool:
    """Whether the store can keep it: YAML has dates, numbers that are none and halves of surrogate pairs too."""
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except (TypeError, ValueError):
        return False
    return True


def _row(store: Path, directory: Path, config: dict[str, dict[str, Any]]) -> dict[str, object]:
    from megatron_vpmoe.metrics.jsonl import read_records
    from megatron_vpmoe.metrics.registration import results_of
    from megatron_vpmoe.training.checkpoint_files import find_newest

    records = read_records(directory / METRICS)
    step = max((record.step for record in records), default=0)
    newest, _ = find_newest(directory / "checkpoints", check_hashes=False)
    state = {} if newest is None else newest.state
    stat = [(directory / name).stat().st_mtime for name in ("config.yaml", METRICS)]
    told: Any = state.get("provenance")
    provenance: dict[str, Any] = told if is_provenance(told) else {}
    experiment = config.get("logging", {}).get("experiment")
    return {
        "name": config["training"]["run_name"],
        "experiment": experiment_of(experiment, directory),
        "directory": written_directory(store, directory),
        "status": "finished" if step >= config["training"]["train_iters"] else "stopped",
        "started": min(stat),
        "ended": max(stat),
        "step": step,
        "host": "",
        "pid": 0,
        "world_size": state.get("world_size", 1),
        "config": json_text(config),
        "config_hash": provenance.get("config_hash"),
        "provenance": json_text(provenance),
        "results": json_text(results_of({record.tag: record.value for record in records})),
    }
