"""What a suite takes where a run or a ladder names it; paths are relative to the working directory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from pydantic import BaseModel, ConfigDict, Field

from megatron_vpmoe.errors import ConfigError
from vpmoe.eval.suites import canaries
from vpmoe.eval.suites.text import Asked
from vpmoe.toml_file import validated


class SuiteOptions(BaseModel):
    """Options of a suite."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)

    @classmethod
    def of(cls, options: Mapping[str, Any], source: str) -> Self:
        """Raises :class:`ConfigError` naming every one that the suite does not take so."""
        known = ", ".join(cls.model_fields)
        return validated(cls, options, error=ConfigError, source=source, remedy=f"the options are {known}")


class Core8Options(SuiteOptions):
    """Of core8."""

    config: Path = Path("configs/eval/core8.toml")
    """Its settings."""
    bundle: Path | None = None
    """Folder of a CORE bundle; null: the public one, where ``vpmoe eval core8`` puts it."""
    tasks: tuple[str, ...] = ()
    """Tasks of the bundle; none: those of the settings."""
    context: int | None = Field(None, ge=2)
    """Longer prompts lose their beginning."""
    batch_size: int | None = Field(None, ge=1)
    """Continuations that a process scores at once."""


class CanaryOptions(SuiteOptions):
    """Of canaries."""

    config: Path = Path("configs/eval/canaries.toml")
    """Its settings and pinned prompts."""
    tasks: tuple[str, ...] = ()
    """Some of the suite; none: all that the vocabulary allows for."""
    plain: bool = False
    """Asked as plain text, though the vocabulary knows conversations."""
    context: int | None = Field(None, ge=2)
    """Tokens of prompt and answer together."""
    max_new_tokens: int | None = Field(None, ge=1)
    """A longer answer is cut."""
    batch_size: int | None = Field(None, ge=1)
    """Answers that a process decodes at once."""

    def chosen(self, items: int | None) -> canaries.Chosen:
        """With a budget of items."""
        return canaries.Chosen(**self.model_dump(exclude={"config"}), items=items)

    def for_any_form(self, items: int | None, source: str) -> canaries.Chosen:
        """The same of models in any form: of one that is asked as plain text, Harmony is left out.

        Raises:
            ConfigError: Harmony is named where all are asked plainly, or without a task that has right answers: then
                there would be no number that one as plain text has too.
        """
        if canaries.HARMONY in self.tasks and (self.plain or set(self.tasks) <= {*canaries.OTHERS}):
            what = "there is none where all are asked as plain text" if self.plain else "not each model has it"
            remedy = (
                "leave it out of the tasks" if self.plain else "name a task with right answers too, such as copying"
            )
            raise ConfigError(f"{canaries.HARMONY}: {what}", source=f"{source}: tasks", remedy=remedy)
        return replace(self.chosen(items), leave_out=True)


class TextOptions(SuiteOptions):
    """Of text: one of ``texts`` and ``data_path``."""

    texts: Path | None = None
    """File or folder of texts."""
    data_path: Path | None = None
    """A dataset of conversations."""
    split: str = "valid"
    """Of it."""
    text_field: str = "text"
    """Column of the text."""
    window: int | None = Field(None, ge=2)
    """Tokens of a text that the model reads at once."""
    stride: int | None = Field(None, ge=1)
    """Tokens from one window to the next."""
    batch_size: int = Field(8, ge=1)
    """Windows that a process reads at once."""

    def asked(self, documents: int | None) -> Asked:
        """With a budget of documents."""
        return Asked(**dict(self), documents=documents)
