"""Runs beside each other: where their configurations differ."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vpmoe.runs.registry import RunEntry

ABSENT = "(absent)"


def config_differences(runs: Sequence[RunEntry]) -> list[tuple[str, list[Any]]]:
    """The fields that are not the same in all runs: (key, the value in each run), in the order of the configuration."""
    keys = dict.fromkeys(
        f"{section}.{name}" for run in runs for section, values in run.config.items() for name in values
    )
    table = [(key, [_value(run, *key.split(".", 1)) for run in runs]) for key in keys]
    return [(key, values) for key, values in table if any(value != values[0] for value in values)]


def _value(run: RunEntry, section: str, name: str) -> Any:
    return run.config.get(section, {}).get(name, ABSENT)
