"""Settings in TOML: read, held to a schema, and what that finds wrong in them told line by line."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from megatron_vpmoe.errors import VpmoeError

Schema = TypeVar("Schema", bound=BaseModel)


def read_toml(path: Path, *, error: type[VpmoeError]) -> dict[str, Any]:
    """A TOML file as a mapping; raises ``error`` where it is missing, no UTF-8 or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise error(
            f"the settings cannot be read: {reason}", source=str(path), remedy="name an existing file"
        ) from cause


def validated(
    schema: type[Schema], values: Mapping[str, Any], *, error: type[VpmoeError], source: str, remedy: str
) -> Schema:
    """Values as their schema; raises ``error`` naming every one that is missing, unknown or wrong, at once."""
    try:
        return schema.model_validate(values)
    except ValidationError as cause:
        raise error("wrong settings:\n    " + "\n    ".join(findings(cause)), source=source, remedy=remedy) from cause


def findings(error: ValidationError) -> list[str]:
    """What a validation found, a line each: ``evaluation.documents: Input should be greater than 0``."""
    return [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
