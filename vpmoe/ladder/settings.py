"""``ladder.toml``, typed: which objects, how they are evaluated, where the report goes."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpmoe.errors import UpcycleError
from vpmoe.upcycle.registry import describe, read_toml


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Evaluation(_Section):
    """What every rung is asked; paths are relative to the working directory."""

    texts: Path
    """Held-out texts, a file or folder as the builder of text datasets reads them."""
    text_field: str = "text"
    """Column of the text."""
    documents: int = Field(ge=1)
    """Texts read at most, from the first on."""
    characters: int = Field(ge=2)
    """Of each text, from its beginning: a length that does not depend on a vocabulary."""
    questions: Path
    """JSONL of held-out rows: ``query``, ``synthetic_answer``, and the family as ``exercise``."""
    per_family: int = Field(ge=1)
    """Questions of each family at most, from the first on."""
    max_new_tokens: int = Field(ge=1)
    """Of an answer; a longer one is cut."""
    batch_size: int = Field(default=32, ge=1)
    """Texts or questions computed together; does not change what is found but for rounding."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Of the computation; the whole model is held in it."""


class Ladder(_Section):
    """One ladder."""

    objects: Path
    """The registry."""
    target: str
    """The last object: the ladder is all that it is made from, in the order of making."""
    reports: Path
    """Folder of the report."""
    evaluation: Evaluation


def read_ladder(path: Path) -> Ladder:
    """Read a ladder's file.

    Raises:
        UpcycleError: no such file, not TOML, or every key that is missing, unknown or of a wrong value, at once.
    """
    try:
        return Ladder.model_validate(read_toml(path))
    except ValidationError as error:
        raise UpcycleError(
            "not a ladder:\n    " + "\n    ".join(describe(error)),
            source=str(path),
            remedy="compare with configs/upcycle/ladder.toml",
        ) from error
