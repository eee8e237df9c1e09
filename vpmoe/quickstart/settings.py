"""``configs/nano/quickstart.toml``, typed: every number of the quickstart that is not the training configuration's."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

from megatron_vpmoe.config.schema_section import Cardinal, Count, Name, Text
from vpmoe.errors import VpmoeError
from vpmoe.toml_file import read_toml, validated

Options = dict[str, bool | int | float | str | dict[str, float]]
"""Options of a command by name, which the command checks."""


class QuickstartError(VpmoeError):
    """A setting that cannot be, or a command that did not do its part."""


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Training(_Section):
    """The run: its configuration (relative to the checkout) and its name."""

    config: Text
    run_name: Name


class Evaluation(_Section):
    """Held-out questions of each family, how they are decoded, and how many generations are kept and printed."""

    per_family: Count
    max_new_tokens: Count
    batch_size: Count
    samples: Cardinal
    shown_samples: Cardinal


class Targets(_Section):
    """What the default quickstart promises, shares in 0..1: over all families, and the accuracy of each of them."""

    validity: float = Field(ge=0, le=1)
    accuracy: float = Field(ge=0, le=1)
    family_accuracy: float = Field(ge=0, le=1)


class Settings(_Section):
    """All sections; the first three are options of ``vpmoe data synth-mini``, ``convert`` and ``build``."""

    rows: Options
    conversations: Options
    dataset: Options
    training: Training
    evaluation: Evaluation
    targets: Targets


def read_settings(path: Path) -> Settings:
    """Read and check a settings file.

    Raises:
        QuickstartError: no such file, not TOML, or every key that is missing, unknown or of a wrong value, at once.
    """
    values = read_toml(path, error=QuickstartError)
    remedy = "compare with configs/nano/quickstart.toml, which is the default one"
    return validated(Settings, values, error=QuickstartError, source=str(path), remedy=remedy)
