"""What the chunks of a text are reminded of: each asks a store with the chunk before it.

A chunk is so many tokens of one document; the vector of a chunk is the mean of its embeddings. What is found for a
chunk hangs on the tokens before it alone, and so does what is left out: documents that begin as the text has up to
there, its own among them. Training, packed rows and decoding therefore find the same.

Shapes: B rows, S positions, G chunks of a row, K entries a chunk, W width, V vocabulary.
"""

from __future__ import annotations

import hashlib
import itertools
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from megatron_vpmoe.errors import ConfigError, DataError
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.retrieval.vector_store import VectorStore
from megatron_vpmoe.think.memory import Memory

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_REMEMBERED = 1 << 14
"""Answers that are kept: texts are read again in each epoch, and many begin alike."""
_AT_ONCE = 1 << 12
"""Documents that are added to a store together: what it holds is copied each time."""
_FEW = 64
"""Vectors left out, up to which questions are asked together: one that leaves out many has to look at as many."""


class Reminder(NamedTuple):
    """What one chunk may read: entries fp32 [K, W], zero beyond the count."""

    entries: NDArray[np.float32]
    count: int


class Recall:
    """A store and how it is asked.

    Args:
        store: of ``chunk_vectors``, marked by ``mark_of``.
        entries: K, at most.
        source: of the store, for messages.

    Raises:
        DataError: the store was not made for this.
    """

    def __init__(self, store: VectorStore, *, entries: int, source: str = "the store") -> None:
        if not {"chunk", "embedding"} <= store.facts.keys():
            raise DataError("the store does not say of what it was made", source=source, remedy=_REBUILD)
        self.store, self.entries, self.source = store, entries, source
        self.chunk = int(store.facts["chunk"])
        self._known: OrderedDict[int, Reminder] = OrderedDict()
        self._table: tuple[tuple[int, int], NDArray[np.float32]] | None = None

    @classmethod
    def of(cls, cfg: RunConfig) -> Recall | None:
        """Of a run; None where the model reads no store.

        Raises:
            ConfigError: it reads one, and none is named.
            DataError: there is none, it is damaged, or was not made for this.
        """
        if cfg.model.memory_entries is None:
            return None
        if cfg.data.store is None:
            raise ConfigError(
                f"the model reads {cfg.model.memory_entries} entries of a store, and none is named",
                source="data.store = null",
                remedy="name the store that it was trained with, from the run of its own",
            )
        path = Path(cfg.data.store)
        return cls(VectorStore.load(path), entries=cfg.model.memory_entries, source=str(path))

    def memory(self, tokens_BS: Tensor, layout: SequenceLayout, table_VW: Tensor) -> Memory:
        """What every position of packed rows may read; on the device of the tokens, which the host waits for unless the
        layout has them on the host too.

        Args:
            tokens_BS: int64.
            layout: documents of the rows.
            table_VW: the embedding.

        Raises:
            DataError: the store was made with another embedding.
        """
        rows_on_host = layout.rows_on_host or (tokens_BS.cpu(), layout.document_id.cpu())
        tokens, document = (one.numpy() for one in rows_on_host)
        chunk_BS = np.full(tokens.shape, -1, np.int64)
        rows: list[list[NDArray[np.int64]]] = []
        for row, own in enumerate(document):
            prefixes: list[NDArray[np.int64]] = []
            for span in _documents(own):
                ids = tokens[row, span]
                chunk_BS[row, span] = len(prefixes) + np.arange(len(ids)) // self.chunk
                prefixes += [ids[:end] for end in range(0, len(ids), self.chunk)]
            rows.append(prefixes)
        found = iter(self.reminders([prefix for row in rows for prefix in row], table_VW))
        chunks = max(map(len, rows), default=0)
        entries = np.zeros((len(rows), chunks, self.entries, self.store.width), np.float32)
        count = np.zeros((len(rows), chunks), np.int64)
        for row, prefixes in enumerate(rows):
            for number in range(len(prefixes)):
                entries[row, number], count[row, number] = next(found)
        return Memory(*(_sent(torch.from_numpy(one), tokens_BS.device) for one in (entries, count, chunk_BS)))

    def reminders(self, prefixes: Sequence[NDArray[np.int64]], table_VW: Tensor) -> list[Reminder]:
        """Of chunks, each given as the tokens of its document before it: a whole number of chunks, or none."""
        table, nothing = self._checked(table_VW), Reminder(np.zeros((self.entries, self.store.width), np.float32), 0)
        marks = [mark_of(prefix) if len(prefix) else 0 for prefix in prefixes]
        together: dict[int, NDArray[np.int64]] = {}
        for mark, prefix in zip(marks, prefixes, strict=True):
            if mark and mark not in self._known and mark not in together:
                left_out = self.store.held(self.store.documents_marked(mark))
                if left_out == len(self.store):
                    self._keep(mark, nothing)
                elif left_out > _FEW:
                    self._ask({mark: prefix}, table)
                else:
                    together[mark] = prefix
        self._ask(together, table)
        answers = []
        for mark in marks:
            if mark:
                self._known.move_to_end(mark)
            answers.append(self._known[mark] if mark else nothing)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)
        return answers

    def remember(self, ids: NDArray[np.integer], table_VW: Tensor) -> int:
        """Add a finished text to the store, whose file stays as it is; one that is held already is not added again.

        Args:
            ids: its tokens.
            table_VW: the embedding.

        Returns:
            vectors that were added.

        Raises:
            DataError: the store is read-only, or was made with another embedding.
        """
        vectors, marks = _entries_of(ids, self._checked(table_VW), self.chunk)
        if not len(marks) or self.store.documents_marked(int(marks[-1])):
            return 0
        self.store.add(vectors, np.full(len(vectors), self.store.next_document), marks)
        self._known.clear()
        return len(vectors)

    def _ask(self, prefixes: dict[int, NDArray[np.int64]], table: NDArray[np.float32]) -> None:
        if prefixes:
            queries = np.concatenate(
                [chunk_vectors(prefix[-self.chunk :], table, self.chunk) for prefix in prefixes.values()]
            )
            without = [self.store.documents_marked(mark) for mark in prefixes]
            found = self.store.search(queries, self.entries, without=without)
            for mark, entries, count in zip(prefixes, found.vectors, found.count.tolist(), strict=True):
                self._keep(mark, Reminder(entries, count))

    def _keep(self, mark: int, reminder: Reminder) -> None:
        self._known[mark] = reminder

    def _checked(self, table_VW: Tensor) -> NDArray[np.float32]:
        """The table on the host; of another one what was found no longer holds, and the store has to be of it."""
        version = table_VW.data_ptr(), table_VW._version
        if self._table is None or self._table[0] != version:
            if self.store.facts["embedding"] != embedding_sha256(table_VW):
                raise DataError(
                    "the store was made with another embedding than the model's",
                    source=self.source,
                    remedy=_REBUILD,
                )
            self._known.clear()
            self._table = version, table_VW.detach().float().cpu().numpy()
        return self._table[1]


_REBUILD = "make it again: vpmoe data build-store DATASET --embedding RUN"


def chunk_vectors(ids: NDArray[np.integer], table: NDArray[np.float32], chunk: int) -> NDArray[np.float64]:
    """[L // chunk, W]: of each whole chunk of a document's tokens [L] the mean of its embeddings."""
    whole = len(ids) // chunk
    return table[ids[: whole * chunk].reshape(whole, chunk)].mean(1, dtype=np.float64)


def mark_of(prefix: NDArray[np.integer]) -> int:
    """A signed 64-bit hash of tokens, by which documents that begin with them are found; never 0."""
    digest = hashlib.blake2b(prefix.astype("<i4").tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True) or 1


def embedding_sha256(table_VW: Tensor) -> str:
    """Of an embedding as bf16 keeps it: that of an expert in fp32 is the same in a model in bf16."""
    rounded = table_VW.detach().to(torch.bfloat16).cpu().contiguous().view(torch.int16)
    return hashlib.sha256(rounded.numpy().tobytes()).hexdigest()


def store_of(
    documents: Iterable[NDArray[np.integer]], table_VW: Tensor, *, chunk: int, capacity: int | None = None
) -> VectorStore:
    """The store that ``Recall`` asks: of each whole chunk of each document its vector.

    Args:
        documents: token ids of each.
        table_VW: the embedding of the models that will read it.
        chunk: tokens of a chunk.
        capacity: vectors at most; the oldest go.
    """
    facts = {"chunk": str(chunk), "embedding": embedding_sha256(table_VW)}
    store = VectorStore(table_VW.shape[1], capacity=capacity, facts=facts)
    table = table_VW.detach().float().cpu().numpy()
    numbered = enumerate(documents)
    while some := list(itertools.islice(numbered, _AT_ONCE)):
        made = [(number, *_entries_of(ids, table, chunk)) for number, ids in some]
        numbers, vectors, marks = zip(*made, strict=True)
        store.add(np.concatenate(vectors), np.repeat(numbers, [*map(len, vectors)]), np.concatenate(marks))
    return store


def _entries_of(
    ids: NDArray[np.integer], table: NDArray[np.float32], chunk: int
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """Of each whole chunk of a text its vector, and the mark of the text up to its end."""
    vectors = chunk_vectors(ids, table, chunk)
    marks = [mark_of(ids[: end * chunk]) for end in range(1, len(vectors) + 1)]
    return vectors, np.array(marks, np.int64)


def _sent(tensor: Tensor, device: torch.device) -> Tensor:
    """On the device; to a GPU the copy is only queued."""
    return (tensor.pin_memory() if device.type == "cuda" else tensor).to(device, non_blocking=True)


def _documents(document_S: NDArray[np.integer]) -> list[slice]:
    """The columns of each document of a row, in order; padding is none."""
    ends = [*(np.flatnonzero(np.diff(document_S)) + 1).tolist(), len(document_S)]
    begins = [0, *ends[:-1]]
    return [slice(a, b) for a, b in zip(begins, ends, strict=True) if document_S[a] >= 0]
