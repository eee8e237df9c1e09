"""Batches for measurements: full rows of random conversations, a pure function of the seed."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from megatron_vpmoe.data.batch import Batch, Document, assemble

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_SHORTEST = 8


def mock_step(cfg: RunConfig, *, step: int, dp_rank: int = 0, dp_size: int = 1) -> list[Batch]:
    """One rank's micro-batches of one step: every row is filled, with no padding.

    A conversation is 1/8 to 1/3 of a row, half of it context, then analysis and final in equal parts.
    """
    rows, length = cfg.training.micro_batch_size, cfg.data.seq_length
    micro_batches = cfg.training.global_batch_size // (rows * dp_size)
    random = np.random.default_rng([step, dp_rank])
    return [
        assemble(
            [_row(random, length, cfg.model.padded_vocab_size) for _ in range(rows)],
            seq_length=length,
            eod_id=0,
            sample_ids=list(range(rows)),
        )
        for _ in range(micro_batches)
    ]


def _row(random: np.random.Generator, length: int, vocab: int) -> list[Document]:
    documents, left = [], length
    while left > 0:
        size = int(random.integers(max(_SHORTEST, length // 8), max(_SHORTEST + 1, length // 3)))
        size = left if left - size < _SHORTEST else size
        left -= size
        span = np.zeros(size, np.uint8)
        span[size // 2 : 3 * size // 4], span[3 * size // 4 : size - 1] = 1, 2
        tokens = random.integers(1, vocab, size).astype(np.int32)
        documents.append(Document(tokens, (span > 0).astype(np.uint8), span))
    return documents
