"""Settings of rung 3, and the texts that they name."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.data.vocabulary_files import NAMING, another_vocabulary
from megatron_vpmoe.manifest import read_manifest
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.job import DrawingSettings, Task
from vpmoe.upcycle.passages import Passages
from vpmoe.upcycle.vocabulary import tokens_of

_ROWS_PER_FEATURE = 4
"""Calibration tokens for each unknown that the closed form gives an output channel, at the least."""


class ShapeSettings(DrawingSettings):
    """Settings of ``shape``."""

    attention: Literal["calibrated", "meanpool"] = "calibrated"
    """"meanpool", the baseline: means over heads and groups."""
    feed_forward: Literal["calibrated", "l2_topk"] = "calibrated"
    """"l2_topk", the baseline: the neurons with the largest columns of the second matrix."""

    calibration: str | None = None
    """Folder of a built dataset: its train split calibrates, its valid split is the held-out text unless ``texts`` are
    given."""
    calibration_texts: list[str] = Field(default_factory=list)
    """Texts to calibrate on, instead of a dataset."""
    calibration_tokens: int = Field(default=65536, ge=1)
    """Tokens to calibrate on, at most; of a dataset's conversations in an order that the seed draws."""
    texts: list[str] = Field(default_factory=list)
    """Held-out texts, on which errors and losses are measured; none of them calibrates."""
    heldout_tokens: int = Field(default=8192, ge=2)
    """Of a dataset's valid split, the tokens on which errors and losses are measured."""
    text_tokens: int = Field(default=512, ge=2)
    """Most tokens of a text or conversation that are read."""

    ridge: float = Field(default=1e-3, ge=0)
    """Penalty of the closed-form fits, in units of a feature's mean variance."""
    steps: int = Field(default=800, ge=0)
    """Of Adam on a block's regression; 0: only the closed form."""
    learning_rate: float = Field(default=0.06, gt=0)
    """Of these steps, in units of a matrix's root mean square."""
    batch_tokens: int = Field(default=512, ge=2)
    """Positions of a batch: one step's, and what passes through a layer at once."""

    @property
    def calibrated(self) -> frozenset[str]:
        """The parts of a layer that are: of "attention" and "feed_forward"."""
        return frozenset(part for part in ("attention", "feed_forward") if getattr(self, part) == "calibrated")

    @model_validator(mode="after")
    def _texts_fit(self) -> ShapeSettings:
        if self.calibration and self.calibration_texts:
            raise ValueError("calibration and calibration_texts: name one of the two")
        if self.calibrated and not (self.calibration or self.calibration_texts):
            raise ValueError(f"{', '.join(sorted(self.calibrated))} calibrated: name calibration or calibration_texts")
        if not (self.texts or self.calibration):
            raise ValueError("nothing to measure on: name texts, or a dataset as calibration")
        if both := set(self.texts) & set(self.calibration_texts):
            raise ValueError(f"a held-out text also calibrates: {min(both)!r}")
        return self


def calibration_passages(task: Task[ShapeSettings]) -> Passages:
    """What to calibrate on.

    Raises:
        UpcycleError: too few tokens for what is to be fitted.
    """
    settings, model = task.settings, task.cfg.model
    if settings.calibration:
        found = _of_dataset(task, "train", settings.calibration_tokens)
    else:
        texts = tokens_of(task.inputs["model"].hf, settings.calibration_texts, settings.text_tokens)
        found = Passages.of_texts(texts).first(settings.calibration_tokens)
    needed = _ROWS_PER_FEATURE * (1 + _most_features(task.cfg))
    if found.num_tokens < needed:
        raise UpcycleError(
            f"{found.num_tokens} calibration tokens; {needed} are needed to fit a layer of {model.ffn_hidden_size} "
            f"neurons and {model.num_attention_heads} heads of {model.kv_channels}",
            source=f"{task.spec.id}: {settings.calibration or 'calibration_texts'}",
            remedy="name a larger dataset or more texts, or raise calibration_tokens and text_tokens",
        )
    return found


def heldout_passages(task: Task[ShapeSettings]) -> Passages:
    """What errors and losses are measured on: never text that calibrates."""
    settings = task.settings
    if settings.texts:
        return Passages.of_texts(tokens_of(task.inputs["model"].hf, settings.texts, settings.text_tokens))
    found = _of_dataset(task, "valid", settings.heldout_tokens)
    if not found.num_scored:
        raise UpcycleError(
            f"none of the first {settings.text_tokens} tokens of any held-out conversation is supervised",
            source=f"{task.spec.id}: {settings.calibration}",
            remedy="raise text_tokens, or name texts",
        )
    return found


def _of_dataset(task: Task[ShapeSettings], split: str, count: int) -> Passages:
    settings = task.settings
    assert settings.calibration is not None
    hf = task.inputs["model"].hf
    files = {name: (hf / name).read_bytes() for name in NAMING if (hf / name).is_file()}
    if other := another_vocabulary(files, read_manifest(settings.calibration), str(hf)):
        raise UpcycleError(other, source=f"{task.spec.id}: calibration", remedy="name a dataset of its vocabulary")
    return Passages.of_dataset(
        settings.calibration,
        split,
        count,
        longest=settings.text_tokens,
        padded_vocab_size=task.cfg.model.padded_vocab_size,
        seed=settings.seed,
    )


def _most_features(cfg: RunConfig) -> int:
    return max(cfg.model.ffn_hidden_size, cfg.model.num_attention_heads * cfg.model.kv_channels)
