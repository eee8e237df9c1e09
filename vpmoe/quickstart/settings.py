"""``configs/nano/quickstart.toml``, typed: every number of the quickstart that is not the training configuration's."""

from __future__ import annotations

import tomllib
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vpmoe.quickstart.errors import QuickstartError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Rows(_Section):
    """Rows of synth_mini: how many, their seed, and the share of each family."""

    count: int = Field(gt=0)
    seed: int
    families: dict[str, float] = Field(min_length=1)


class Conversations(_Section):
    """The conversion to Harmony; an empty text leaves its line or message out."""

    num_shards: int = Field(gt=0)
    model_identity: str
    knowledge_cutoff: str
    conversation_start_date: str
    reasoning_effort: str
    valid_channels: str
    developer_instructions: str


class Dataset(_Section):
    """The built dataset: its validation share and the ids of its compact vocabulary."""

    valid_fraction: float = Field(gt=0, lt=1)
    compact_vocab_size: int = Field(gt=0)
    workers: int = Field(gt=0)


class Training(_Section):
    """The run: its configuration (relative to the checkout) and its name."""

    config: str
    run_name: str = Field(min_length=1)


class Evaluation(_Section):
    """Held-out questions of each family, how they are decoded, and how many generations are kept and printed."""

    per_family: int = Field(gt=0)
    max_new_tokens: int = Field(gt=0)
    batch_size: int = Field(gt=0)
    samples: int = Field(ge=0)
    shown_samples: int = Field(ge=0)


class Targets(_Section):
    """What the default quickstart promises, as shares in 0..1: validity over all families, accuracy of one."""

    validity: float = Field(ge=0, le=1)
    family: str
    accuracy: float = Field(ge=0, le=1)


class Settings(_Section):
    """All sections."""

    rows: Rows
    conversations: Conversations
    dataset: Dataset
    training: Training
    evaluation: Evaluation
    targets: Targets


def read_settings(path: Path) -> Settings:
    """Read and check a settings file.

    Raises:
        QuickstartError: no such file, not TOML, or every key that is missing, unknown or of a wrong value, at once.
    """
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
        settings = Settings.model_validate(content)
    except FileNotFoundError as error:
        raise QuickstartError(
            "there is no settings file", source=str(path), remedy="configs/nano/quickstart.toml is the default one"
        ) from error
    except tomllib.TOMLDecodeError as error:
        raise QuickstartError(
            f"the settings are not TOML: {error}", source=str(path), remedy="mend that line"
        ) from error
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, found['loc']))}: {found['msg']}" for found in error.errors()]
        raise QuickstartError(
            "settings that cannot be:\n  - " + "\n  - ".join(problems),
            source=str(path),
            remedy="compare with configs/nano/quickstart.toml",
        ) from error
    if settings.targets.family not in settings.rows.families:
        raise QuickstartError(
            f"targets.family is {settings.targets.family!r}, the rows are of {', '.join(settings.rows.families)}",
            source=str(path),
            remedy="name one of them",
        )
    return settings
