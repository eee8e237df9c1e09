"""How likely a model finds texts, and the conversations of a dataset: nats a token, perplexity, bits per byte.

Losses of different vocabularies compare per byte of text, not per token. So positions are counted in bytes too: where a
token begins in its document. Special tokens have no bytes; in conversations what they cost counts all the same.

A text's first token is not scored, as nothing stands before it; its bytes are not counted either. A text longer than
the window is read in windows that overlap: each other token is scored once, where most stands before it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from vpmoe.errors import DataError
from vpmoe.tokenizer.interface import Tokenizer

if TYPE_CHECKING:
    from megatron_vpmoe.data.kd_dataset import KDDataset
    from megatron_vpmoe.model.gpt import VPModel

BOUNDS = tuple(256 * 4**power for power in range(8))
"""Where the buckets of positions end, in bytes from the beginning of a document."""
BUCKETS = (*(f"{low}-{high - 1}" for low, high in zip((0, *BOUNDS[:-1]), BOUNDS, strict=True)), f"{BOUNDS[-1]}-")


@dataclass(frozen=True)
class Passage:
    """Consecutive tokens of a document, which go through the model in one pass.

    Attributes:
        document: its place among the documents.
        tokens: int64 [L], what the model reads.
        labels: int64 [L], what is to follow each.
        scored: bool [L], which of the labels count.
        span: int64 [L], what the labels are part of.
        begin: int64 [L], bytes of the document before each label.
        size: int64 [L], bytes of each label.
    """

    document: int
    tokens: np.ndarray
    labels: np.ndarray
    scored: np.ndarray
    span: np.ndarray
    begin: np.ndarray
    size: np.ndarray


@dataclass(frozen=True)
class Sums:
    """Nats, tokens and bytes, each summed over documents and spans [3, D, spans], spans and buckets [3, spans, B]."""

    documents: np.ndarray
    cells: np.ndarray

    def entry(self, span: int | slice = slice(None)) -> dict[str, Any]:
        """The numbers of one span, or of all."""
        return {
            **_numbers(*self.cells[:, span].reshape(3, -1).sum(1)),
            "by_byte_position": {
                name: _numbers(*column)
                for name, column in zip(BUCKETS, self.cells[:, span].reshape(3, -1, len(BUCKETS)).sum(1).T, strict=True)
                if column[1]
            },
        }


def _numbers(nats: float, tokens: float, size: float) -> dict[str, Any]:
    mean = float(nats / tokens)
    return {
        "tokens": int(tokens),
        "bytes": int(size),
        "nats_per_token": mean,
        "perplexity": math.exp(min(mean, 700.0)),
        "bits_per_byte": float(nats / math.log(2) / size) if size else None,
    }


def text_passages(
    tokenizer: Tokenizer, texts: Sequence[str], window: int | None = None, stride: int | None = None
) -> list[Passage]:
    """Texts in windows.

    Args:
        tokenizer: their vocabulary.
        texts: those of fewer than two tokens have nothing to be scored.
        window: tokens that the model reads at once; None: a text as a whole.
        stride: tokens from one window to the next, at most the window; None: half of it.

    Raises:
        DataError: no text has two tokens, or the stride would leave tokens out.
    """
    if window is not None and not 1 <= (stride or max(1, window // 2)) <= window:
        raise DataError(
            f"stride {stride} with windows of {window} tokens", source="--stride", remedy="1 to the window's tokens"
        )
    lengths = _byte_lengths(tokenizer)
    passages = []
    for number, text in enumerate(texts):
        ids = tokenizer.encode_ordinary(text).astype(np.int64)
        begin = np.cumsum(lengths[ids]) - lengths[ids]
        for start, stop, fresh in _windows(len(ids) - 1, window, stride):
            labels = slice(start + 1, stop + 1)
            scored = np.arange(start, stop) >= fresh
            span = np.zeros(stop - start, dtype=np.int64)
            passages.append(
                Passage(number, ids[start:stop], ids[labels], scored, span, begin[labels], lengths[ids[labels]])
            )
    if not passages:
        raise DataError("no text of two tokens", source="the texts to score", remedy="name longer texts")
    return passages


def _windows(count: int, window: int | None, stride: int | None) -> Iterator[tuple[int, int, int]]:
    """Of so many positions: begin and end of each window, and its first position that none before has scored."""
    step, fresh, start = stride or max(1, (window or 2) // 2), 0, 0
    while fresh < count:
        stop = count if window is None else min(count, start + window)
        yield start, stop, fresh
        start, fresh = start + step, stop


def dataset_passages(dataset: KDDataset, tokenizer: Tokenizer) -> Iterator[Passage]:
    """The conversations of a dataset: what is supervised, by the span it is part of."""
    lengths = _byte_lengths(tokenizer)
    for number in range(len(dataset)):
        document = dataset[number]
        labels = document.labels.astype(np.int64)
        if not document.loss_mask[:-1].any():
            continue
        size = lengths[labels]
        yield Passage(
            number,
            document.tokens[:-1].astype(np.int64),
            labels,
            document.loss_mask[:-1].astype(bool),
            document.span_id[:-1].astype(np.int64),
            np.cumsum(size) - size,
            size,
        )


def _byte_lengths(tokenizer: Tokenizer) -> np.ndarray:
    lengths = np.array([len(piece) for piece in tokenizer.pieces()], dtype=np.int64)
    lengths[tokenizer.first_special_id :] = 0
    return lengths


@torch.no_grad()
def measure(
    model: VPModel,
    passages: Sequence[Passage],
    *,
    batch_size: int,
    spans: int = 1,
    watch: Callable[[int], None] = lambda count: None,
    check: Callable[[], None] = lambda: None,
) -> Sums:
    """Sums over passages, those of all ranks; a collective, in which the data-parallel ranks share the passages out.

    With experts spread over ranks a forward pass is a collective: all then compute batches of one shape, filled up.

    Args:
        model: bare, in evaluation mode, of one pipeline stage.
        passages: at least one with a label that is scored.
        batch_size: of passages, which are of like length.
        spans: how many there are.
        watch: told how many have been done, by this rank.
        check: called before each batch, as often on each rank; may raise.
    """
    from megatron.core import parallel_state

    from megatron_vpmoe.model.attention.masks import left_padded
    from megatron_vpmoe.model.tensor_parallel import whole_sequences

    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    documents = spans * (1 + max(passage.document for passage in passages))
    sums = np.zeros((3, documents + spans * len(BUCKETS)))
    nats = torch.zeros(sums.shape[1], dtype=torch.float64, device=model.device)
    together = model.pg_collection.ep.size() > 1
    ordered, step = sorted(passages, key=lambda passage: len(passage.tokens)), batch_size * size
    for first in range(0, len(ordered), step):
        check()
        of_all = ordered[first : first + step]
        batch = of_all[rank::size]
        if not (batch or together):
            continue
        filler, longest = (-(-len(of_all) // size) - len(batch), len(of_all[-1].tokens)) if together else (0, 0)
        rows = [*(passage.tokens.tolist() for passage in batch), *[[0]] * filler]
        ids, layout = left_padded(rows, model.device, longest)
        labels, scored = torch.zeros(ids.shape, dtype=torch.int64), torch.zeros(ids.shape, dtype=torch.bool)
        for row, passage in enumerate(batch):
            labels[row, -len(passage.labels) :] = torch.from_numpy(passage.labels)
            scored[row, -len(passage.labels) :] = torch.from_numpy(passage.scored)
        with whole_sequences(model):
            log_p, _ = model(ids, layout).log_probabilities(labels.to(ids.device), scored.to(ids.device))
        if not batch:
            continue
        document = np.concatenate([np.full(passage.scored.sum(), passage.document) for passage in batch])
        span, bucket = _of(batch, "span"), np.searchsorted(BOUNDS, _of(batch, "begin"), side="right")
        for index in (document * spans + span, documents + span * len(BUCKETS) + bucket):
            nats.index_add_(0, torch.from_numpy(index).to(ids.device), -log_p.double())
            np.add.at(sums[1], index, 1)
            np.add.at(sums[2], index, _of(batch, "size"))
        watch(len(batch))
    sums[0] = nats.cpu().numpy()
    if size > 1:
        table = torch.from_numpy(sums).to(model.device)
        torch.distributed.all_reduce(table, group=parallel_state.get_data_parallel_group())
        sums = table.cpu().numpy()
    return Sums(sums[:, :documents].reshape(3, -1, spans), sums[:, documents:].reshape(3, spans, len(BUCKETS)))


def _of(batch: Sequence[Passage], name: str) -> np.ndarray:
    return np.concatenate([getattr(passage, name)[passage.scored] for passage in batch])


def score_texts(model: VPModel, tokenizer: Tokenizer, texts: Sequence[str], batch_size: int) -> dict[str, Any]:
    """How likely the model finds texts, each read as a whole.

    Returns:
        ``documents``, ``bytes`` and ``tokens`` that were scored, ``nats_per_token``, ``bits_per_byte``.
    """
    sums = measure(model, text_passages(tokenizer, texts), batch_size=batch_size)
    entry = sums.entry()
    names = ("bytes", "tokens", "nats_per_token", "bits_per_byte")
    return {"documents": int(np.count_nonzero(sums.documents[1, :, 0])), **{name: entry[name] for name in names}}
