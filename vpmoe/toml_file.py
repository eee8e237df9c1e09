"""Settings in TOML: read, and what a schema finds wrong in them told line by line."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_vpmoe.errors import VpmoeError


def read_toml(path: Path, *, error: type[VpmoeError]) -> dict[str, Any]:
    """A TOML file as a mapping; raises ``error`` where it is missing, no UTF-8 or no TOML."""
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as cause:
        reason = cause.strerror if isinstance(cause, OSError) else cause
        raise error(f"not a readable TOML file: {reason}", source=str(path), remedy="name an existing file") from cause


def findings(error: ValidationError) -> list[str]:
    """What a validation found, a line each: ``evaluation.documents: Input should be greater than 0``."""
    return [f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()]
