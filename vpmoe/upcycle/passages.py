"""Texts as tokens for calibration and measurement: from a built dataset, or tokenized from a job's settings.

A job that calibrates has ``TextSettings`` and is a ``TextJob``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from pydantic import Field, model_validator

from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.data.vocabulary_files import NAMING, another_vocabulary
from megatron_vpmoe.manifest import read_manifest
from vpmoe.errors import UpcycleError
from vpmoe.upcycle.job import DrawingSettings, Job, Task
from vpmoe.upcycle.ladder_file import ObjectSpec
from vpmoe.upcycle.vocabulary import tokens_of

_SHORTEST = 2
"""Tokens of a passage: one that is read, one that follows."""


@dataclass(frozen=True)
class Passages:
    """Pieces of text, each read from its start.

    Attributes:
        tokens: of each passage, at least two.
        scored: of each passage as many; entry t says whether token t + 1 counts in a loss, so the last is False.
    """

    tokens: list[list[int]]
    scored: list[list[bool]]

    @classmethod
    def of_texts(cls, tokens: Sequence[Sequence[int]]) -> Passages:
        """Plain text: every token but the first of a passage is scored."""
        return cls([list(text) for text in tokens], [[True] * (len(text) - 1) + [False] for text in tokens])

    @classmethod
    def of_dataset(
        cls, folder: Path | str, split: str, count: int, *, longest: int, padded_vocab_size: int, seed: int
    ) -> Passages:
        """Conversations of a built dataset in an order that the seed draws, ``count`` tokens at most; the last is cut.

        What is scored are the tokens that the dataset supervises as they stand.

        Args:
            folder: that holds manifest.json.
            split: "train" or "valid"; it may hold fewer tokens than ``count``, the caller asks ``num_tokens``.
            longest: tokens of one conversation that are read.
            padded_vocab_size: of the model.
            seed: of the order.

        Raises:
            DataError: there is no such split, or it is damaged.
            TokenizerError: the dataset's vocabulary is not of the model's size.
        """
        dataset = KDDataset.open(
            folder, split, seq_length=read_manifest(folder).seq_length, padded_vocab_size=padded_vocab_size
        )
        tokens: list[list[int]] = []
        scored: list[list[bool]] = []
        order, room = iter(np.random.default_rng(seed).permutation(len(dataset))), count
        while room >= _SHORTEST and (index := next(order, None)) is not None:
            document = dataset[int(index)]
            tokens.append(document.tokens[: min(longest, room)].tolist())
            supervised = document.loss_mask[:-1].astype(bool) & (document.labels == document.tokens[1:])
            scored.append([*supervised[: len(tokens[-1]) - 1].tolist(), False])
            room -= len(tokens[-1])
        return cls(tokens, scored)

    @property
    def num_tokens(self) -> int:
        """Over all passages."""
        return sum(map(len, self.tokens))

    @property
    def num_scored(self) -> int:
        """Tokens that count in a loss."""
        return sum(map(sum, self.scored))

    def batches(self, most_tokens: int) -> list[list[int]]:
        """Indices of passages, similar lengths together, so that a padded batch has at most so many positions.

        A longer passage is a batch of its own.
        """
        found: list[list[int]] = []
        for index in sorted(range(len(self.tokens)), key=lambda i: (len(self.tokens[i]), i)):
            length = len(self.tokens[index])
            if found and length * (len(found[-1]) + 1) <= most_tokens:
                found[-1].append(index)
            else:
                found.append([index])
        return found


class TextSettings(DrawingSettings):
    """Settings of a job that calibrates on text and measures on other text."""

    calibration: str | None = None
    """Folder of a built dataset: its train split calibrates, its valid split is the held-out text unless ``texts`` are
    given."""
    calibration_texts: list[str] = Field(default_factory=list)
    """Texts to calibrate on, instead of a dataset."""
    calibration_tokens: int = Field(default=65536, ge=2)
    """Tokens to calibrate on, at most; of a dataset's conversations in an order that the seed draws."""
    texts: list[str] = Field(default_factory=list)
    """Held-out texts, on which errors and losses are measured; none of them calibrates."""
    heldout_tokens: int = Field(default=8192, ge=2)
    """Of a dataset's valid split, the tokens on which errors and losses are measured, at most."""
    text_tokens: int = Field(default=512, ge=2)
    """Most tokens of a text or conversation that are read."""
    batch_tokens: int = Field(default=512, ge=2)
    """Positions of a batch: what passes through a layer at once, and one step's of a regression."""

    @property
    def calibrated(self) -> frozenset[str]:
        """What is calibrated, of what the job can."""
        raise NotImplementedError

    @model_validator(mode="after")
    def _texts_fit(self) -> TextSettings:
        if self.calibration and self.calibration_texts:
            raise ValueError("calibration and calibration_texts: name one of the two")
        if self.calibrated and not (self.calibration or self.calibration_texts):
            raise ValueError(f"{', '.join(sorted(self.calibrated))} calibrated: name calibration or calibration_texts")
        if not (self.texts or self.calibration):
            raise ValueError("nothing to measure on: name texts, or a dataset as calibration")
        if both := set(self.texts) & set(self.calibration_texts):
            raise ValueError(f"a held-out text also calibrates: {min(both)!r}")
        return self


Settings = TypeVar("Settings", bound=TextSettings)


class TextJob(Job[Settings]):
    """A job with ``TextSettings``."""

    def decides(self, spec: ObjectSpec, settings: Settings) -> dict[str, Any]:
        found = super().decides(spec, settings)
        if settings.calibration:  # the dataset counts, not where it lies
            found["settings"]["calibration"] = read_manifest(settings.calibration).sha256
        return found


def calibration_passages(task: Task[Settings]) -> Passages:
    """What to calibrate on: ``calibration_tokens`` tokens at most."""
    settings = task.settings
    if settings.calibration:
        return _of_dataset(task, settings.calibration, "train", settings.calibration_tokens)
    found: list[list[int]] = []
    room = settings.calibration_tokens
    for tokens in tokens_of(task.inputs["model"].hf, settings.calibration_texts, settings.text_tokens):
        if room >= _SHORTEST:
            found.append(tokens[:room])
            room -= len(found[-1])
    return Passages.of_texts(found)


def heldout_passages(task: Task[Settings]) -> Passages:
    """What errors and losses are measured on: never text that calibrates.

    Raises:
        UpcycleError: nothing of it counts in a loss.
    """
    settings = task.settings
    if settings.texts or not settings.calibration:
        return Passages.of_texts(tokens_of(task.inputs["model"].hf, settings.texts, settings.text_tokens))
    found = _of_dataset(task, settings.calibration, "valid", settings.heldout_tokens)
    if not found.num_scored:
        raise UpcycleError(
            f"none of the first {settings.text_tokens} tokens of any held-out conversation is supervised",
            source=f"{task.spec.id}: {settings.calibration}",
            remedy="raise text_tokens, or name texts",
        )
    return found


def _of_dataset(task: Task[Settings], folder: str, split: str, count: int) -> Passages:
    hf = task.inputs["model"].hf
    files = {name: (hf / name).read_bytes() for name in NAMING if (hf / name).is_file()}
    if other := another_vocabulary(files, read_manifest(folder), str(hf)):
        raise UpcycleError(other, source=f"{task.spec.id}: calibration", remedy="name a dataset of its vocabulary")
    return Passages.of_dataset(
        folder,
        split,
        count,
        longest=task.settings.text_tokens,
        padded_vocab_size=task.cfg.model.padded_vocab_size,
        seed=task.settings.seed,
    )
