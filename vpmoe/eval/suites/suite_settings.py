"""What the settings of suites have in common: how many items there are of each size, and how many are done at once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field

from megatron_vpmoe.errors import ConfigError
from vpmoe.toml_file import read_toml, validated

ALL = "all"


class SizedSettings(BaseModel):
    """Settings in a file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    batch_size: int = Field(ge=1)
    items: dict[str, Annotated[int, Field(ge=1)]]
    """Items by the name of a size."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Raises :class:`ConfigError` naming what is wrong in the file."""
        values = read_toml(path, error=ConfigError)
        return validated(cls, values, error=ConfigError, source=str(path), remedy="correct the settings named above")

    def limit(self, size: str) -> int | None:
        """Items of a size; None: all."""
        if size != ALL and size not in self.items:
            known = ", ".join([*self.items, ALL])
            raise ConfigError(f"there is no size {size!r}", source="--size", remedy=f"choose among {known}")
        return self.items.get(size)
