"""Settings in TOML: read, held to a schema, and what that finds wrong in them told line by line."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Iterator, Mapping
from datetime import date, time
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_vpmoe.config import stored_faults
from megatron_vpmoe.config.settings_file import read_settings, shown
from megatron_vpmoe.errors import VpmoeError

_DEEPEST, _LARGEST = 10, 10**12
Schema = TypeVar("Schema", bound=BaseModel)


def read_toml(path: Path, *, error: type[VpmoeError]) -> dict[str, Any]:
    """A TOML file as a mapping; raises ``error`` where there is none, or naming every value that nothing can mean."""
    try:
        values = tomllib.loads(read_settings(path))
    except (ValueError, RecursionError) as cause:
        raise error(
            f"the settings cannot be read: {cause}", source=str(path)[:500], remedy="name an existing TOML file"
        ) from cause
    if faults := list(_meaningless(values)):
        remedy = "correct the values named above"
        raise error("wrong settings:\n    " + "\n    ".join(faults[:20]), source=str(path), remedy=remedy)
    return values


def _meaningless(values: Any, place: str = "", depth: int = 0) -> Iterator[str]:
    """Values that no setting has, whatever its schema, a line each."""
    if depth > _DEEPEST:
        yield f"{place}: nested more than {_DEEPEST} deep"
    elif isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from _meaningless(value, f"{place}.{key}" if place else str(key)[:100], depth + 1)
    elif isinstance(values, float | int) and not abs(values) <= _LARGEST:
        yield f"{place} = {shown(values)}: a number is at most {_LARGEST:,}"
    elif isinstance(values, float) and values == 0 and math.copysign(1, values) < 0:
        yield f"{place} = {values}: 0 has no sign"
    elif isinstance(values, date | time):
        yield f"{place} = {values}: no setting is a date or time; quote a text"
    elif isinstance(values, str) and "\0" in values:
        yield f"{place} = {shown(values)}: no text holds NUL"


def validated(
    schema: type[Schema], values: Mapping[str, Any], *, error: type[VpmoeError], source: str, remedy: str
) -> Schema:
    """Values as their schema; raises ``error`` naming every one that is missing, unknown or wrong, at once."""
    try:
        return schema.model_validate(values)
    except ValidationError as cause:
        raise error(
            "wrong settings:\n    " + "\n    ".join(stored_faults(cause)), source=source, remedy=remedy
        ) from cause
