"""What a suite leaves behind: ``reports/eval/<suite>/<checkpoint>.json``, one form for all, and its items beside it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from megatron_vpmoe.config import config_hash
from megatron_vpmoe.files import json_line, write_atomically
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.software import git_state, package_versions
from vpmoe.errors import DataError
from vpmoe.eval.open_model import Opened
from vpmoe.eval.reports import check_reportable, write_report

KIND, SCHEMA_VERSION = "eval_suite", 1
_Z = 1.959963984540054  # of a two-sided 95 % interval


def wilson(right: int, n: int) -> list[float]:
    """The 95 % interval of a share: Wilson's score interval (1927), which stays within 0 and 1 at any share."""
    share, spread = right / n, _Z * _Z / n
    middle = (share + spread / 2) / (1 + spread)
    half = _Z * math.sqrt(share * (1 - share) / n + spread / (4 * n)) / (1 + spread)
    return [max(0.0, middle - half), min(1.0, middle + half)]


def shares(right: int, n: int, chance: float = 0.0) -> dict[str, Any]:
    """A task's ``accuracy``, ``centered`` (guessing is 0, perfection 1) and ``n``, with their 95 % intervals."""

    def centered(accuracy: float) -> float:
        return (accuracy - chance) / (1 - chance)

    interval = wilson(right, n)
    return {
        "accuracy": right / n,
        "centered": centered(right / n),
        "n": n,
        "interval": interval,
        "centered_interval": [centered(bound) for bound in interval],
    }


def default_output(suite: str, opened: Opened) -> Path:
    """Where the report on a model lies; each checkpoint of a run has its own."""
    name = opened.name if opened.iteration is None else f"{opened.name}_{opened.iteration:07d}"
    return Path("reports") / "eval" / suite / f"{name}.json"


def items_file(output: Path) -> Path:
    """Beside a report: a line of JSON an item."""
    return output.with_suffix(".items.jsonl")


def check_writable(output: Path, *, overwrite: bool) -> None:
    """Refuse to replace a report before anything is computed for it.

    Raises:
        NotOursError: something else lies there.
        DataError: a report does, and ``overwrite`` does not allow for it.
    """
    check_reportable(output, KIND)
    if output.exists() and not overwrite:
        raise DataError(
            "here lies a finished report", source=str(output), remedy="--overwrite replaces it, --output names another"
        )


def head(suite: str, opened: Opened, settings: Mapping[str, Any]) -> dict[str, Any]:
    """What every report begins with: what it is, of which weights, by which code, with which settings."""
    return {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "suite": suite,
        "checkpoint": opened.entry,
        "config_hash": config_hash(opened.trained or opened.cfg),
        "vocabulary": opened.tokenizer.identity,
        "software": {"git": git_state(), **package_versions(["torch", "megatron-core"])},
        "machine": {"device": str(opened.model.device), "processes": distributed.world_size()},
        "settings": dict(settings),
    }


def write(output: Path, report: Mapping[str, Any], items: Iterable[Mapping[str, Any]]) -> None:
    """Write the items, then the report; by rank 0 alone."""

    def both() -> None:
        write_atomically(items_file(output), "".join(map(json_line, items)).encode())
        write_report(output, dict(report))

    distributed.from_rank_0(both)
