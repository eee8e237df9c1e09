"""Texts as tokens for calibration and measurement: from a built dataset, or tokenized from a job's settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.manifest import read_manifest


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
        """Conversations of a built dataset in an order that the seed draws, until there are ``count`` tokens.

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
        found = 0
        for index in np.random.default_rng(seed).permutation(len(dataset)):
            document = dataset[int(index)]
            tokens.append(document.tokens[:longest].tolist())
            supervised = document.loss_mask[:-1].astype(bool) & (document.labels == document.tokens[1:])
            scored.append([*supervised[: len(tokens[-1]) - 1].tolist(), False])
            found += len(tokens[-1])
            if found >= count:
                break
        return cls(tokens, scored)

    def first(self, count: int) -> Passages:
        """Whole passages from the start until there are ``count`` tokens, or all."""
        kept = found = 0
        while kept < len(self.tokens) and found < count:
            found += len(self.tokens[kept])
            kept += 1
        return Passages(self.tokens[:kept], self.scored[:kept])

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
