"""The settings files of this room, typed: every number that is not in a training configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Literal, TypeVar

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


class Stage(_Section):
    """A training: its configuration, relative to the checkout, and fields of it that are otherwise here."""

    config: Text
    overrides: Options = {}


class ProofSettings(_Section):
    """What every proof has: ``rows`` and ``dataset`` take the place of options of the same name in the quickstart's,
    ``per_family`` of its."""

    per_family: Count
    rows: Options
    dataset: Options


class RlTargets(_Section):
    """What ``vpmoe rl-nano`` promises of each seed."""

    exact_gain: float = Field(ge=-1, le=1)
    validity_change: float = Field(ge=-1, le=1)
    pair_accuracy: float = Field(ge=0, le=1)


class RlSettings(ProofSettings):
    """``configs/nano/rl_nano.toml``; ``pairs`` are options of ``vpmoe eval pairs``."""

    sft: Stage
    grpo: Stage
    dpo: Stage
    pairs: Options
    targets: RlTargets


class DistilTargets(_Section):
    """What ``vpmoe distil-nano`` promises: shares in 0..1, nats a token; all but the teacher's of each seed."""

    teacher_exact: float = Field(ge=0, le=1)
    stored_over_ce_exact: float = Field(ge=-1, le=1)
    stored_over_ce_kl: float = Field(ge=-1, le=1, description="share of KL to the teacher that stored records save")
    top_k_share_of_kl: float = Field(ge=0, le=1)
    on_policy_exact_gain: float = Field(ge=-1, le=1)
    on_policy_gap_fall: float = Field(ge=-1, le=1, description="share of the gap that is gone in the end")


class DistilSettings(ProofSettings):
    """``configs/nano/distil_nano.toml``; ``store`` are options of ``vpmoe data score``.

    ``start`` is what every student begins with, ``stage2`` how those of stored conversations are trained, ``stage3``
    how ``stored_topk``, and those named in ``after``, go on on-policy.
    """

    teacher: Stage
    start: Stage
    store: Options
    stage2: Stage
    stage3: Stage
    after: list[Literal["ce", "live_topk"]]
    targets: DistilTargets


class StoryTargets(_Section):
    """What ``vpmoe nano-moe`` promises of each seed: shares in 0..1, and the perplexity of held-out stories."""

    perplexity: float = Field(gt=1)
    required_words: float = Field(ge=0, le=1, description="after SFT")
    required_words_gain: float = Field(ge=-1, le=1, description="above the pretrained model")
    protagonist_gain: float = Field(ge=-1, le=1, description="of DPO above SFT")
    banned_words: float = Field(ge=0, le=1, description="after DPO, at most")


class Figures(_Section):
    """So many held-out prompts, and tokens that the models write to each, for ``vpmoe make-plots``."""

    prompts: Count
    max_new_tokens: int = Field(ge=2)  # as make-plots wants; refused before the trainings, not behind them


class StorySettings(_Section):
    """``configs/nano_moe/pipeline.toml``; but for trainings and targets, options of the command that is named there."""

    stories: Options
    tokenizer: Options
    prompts: Options
    pairs: Options
    pretrain: Stage
    sft: Stage
    dpo: Stage
    evaluation: Options
    figures: Figures
    targets: StoryTargets


class ThinkSettings(_Section):
    """``configs/think/nano/pipeline.toml``; ``rows`` and ``dataset`` as of :class:`ProofSettings`.

    ``domains`` are mixes of task families, each a dataset of its own; ``store`` are options of
    ``vpmoe data build-store``, of which a chunk reads ``memory_entries``; the stages are those of ``vpmoe think-nano``.
    """

    rows: Options
    dataset: Options
    domains: dict[Name, dict[str, float]] = Field(min_length=2)
    transformer: Stage
    state_space: Stage
    diffuser: Stage
    store: Options
    memory_entries: Count
    mixture: Stage


Schema = TypeVar("Schema", bound=_Section)
ProofSchema = TypeVar("ProofSchema", bound=ProofSettings)


def read_settings(path: Path, schema: type[Schema] = Settings) -> Schema:
    """Read and check a settings file.

    Raises:
        QuickstartError: no such file, not TOML, or every key that is missing, unknown or of a wrong value, at once.
    """
    values = read_toml(path, error=QuickstartError)
    remedy = "compare with the default one in configs/nano, configs/nano_moe or configs/think/nano"
    return validated(schema, values, error=QuickstartError, source=str(path), remedy=remedy)
