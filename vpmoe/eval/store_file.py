"""The file of the store that a mixture reads outside of training: the one that its run was trained with, or one of the
user's that began as a copy of it and takes finished conversations in."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_vpmoe.errors import CheckpointError, NotOursError
from megatron_vpmoe.files import sha256_of_file
from megatron_vpmoe.ownership import owned
from megatron_vpmoe.retrieval.store_format import GROWN_FROM, facts_of
from megatron_vpmoe.retrieval.vector_store import VectorStore
from vpmoe.errors import DataError

if TYPE_CHECKING:
    from vpmoe.eval.open_model import Opened

Keep = Callable[[Sequence[int]], str]
"""Takes the token ids of a finished text into a store, and says in a line what has come of it."""
_REMEDY = "name the file by --store of vpmoe sample, chat or eval text, or lay it where the run had it"


class StoreFile(NamedTuple):
    """A file, and the hash of its bytes."""

    path: Path
    sha256: str


def store_read(opened: Opened) -> StoreFile | None:
    """The store that a model reads; None: it reads none.

    Raises:
        CheckpointError: the file is not there, or is neither the one that the run was trained with nor grown from it.
        DataError: a store is named, and the model reads none.
    """
    if opened.cfg.model.memory_entries is None:
        if opened.store is not None:
            raise DataError(
                f"{opened.described} reads no store", source=str(opened.store), remedy="leave the store out"
            )
        return None
    named = opened.store or opened.cfg.data.store
    if named is None or opened.store_sha256 is None:
        raise CheckpointError(
            f"nobody says which store {opened.described} was trained with",
            source=str(opened.path),
            remedy="open a checkpoint of the run itself",
        )
    path = Path(named)
    if not path.is_file():
        told = f"the store that {opened.described} was trained with is not there"
        raise CheckpointError(told, source=f"{path}, for {opened.path}", remedy=_REMEDY)
    sha256 = sha256_of_file(path)
    if opened.store_sha256 not in (sha256, facts_of(path).get(GROWN_FROM)):
        raise CheckpointError(
            f"this is not the store that {opened.described} was trained with: its sha256 begins with "
            f"{sha256[:12]}, not with {opened.store_sha256[:12]}",
            source=f"{path}, for {opened.path}",
            remedy=_REMEDY,
        )
    return StoreFile(path, sha256)


@contextmanager
def remembering(opened: Opened, own: Path | None) -> Iterator[tuple[Opened, Keep | None]]:
    """The model with a store of the user's own to read, which takes in what ``Keep`` is given; no other process may.

    Args:
        opened: the model.
        own: the file; where there is none yet, it begins as a copy of the store that is read. None: nothing is kept.

    Raises:
        CheckpointError: the file has not grown from the store that the run was trained with; or that one is not there.
        NotOursError: the file is that store itself, which stays as it is.
        DataError: the model reads no store.
        BusyError: another process keeps texts there.
    """
    from megatron_vpmoe.think.mixture_model import MixtureModel

    if own is None:
        yield opened, None
        return
    mine, begun = replace(opened, store=own), own.exists()
    read = (mine if begun or opened.cfg.model.memory_entries is None else opened).store_file
    assert read is not None
    if begun and read.sha256 == opened.store_sha256:
        raise NotOursError(
            f"this is the store that {opened.described} was trained with, and it stays as it is",
            source=str(own),
            remedy="name another file: one that is not there yet begins as a copy of it",
        )
    with owned(own.with_name(f".{own.name}.lock"), f"the store {own}"):
        if not begun:
            store = VectorStore.load(read.path)
            store.facts[GROWN_FROM] = str(opened.store_sha256)
            store.save(own)
        model = mine.model
        assert isinstance(model, MixtureModel) and model.recall is not None
        recall = model.recall
        recall.store.read_only = False

        def keep(ids: Sequence[int]) -> str:
            added = model.remember(ids)
            if not added:
                return f"{own}: nothing added, as it holds this text, or {recall.chunk} tokens have not been said"
            recall.store.save(own, overwrite=True)
            return f"{own}: {added:,} vectors added, {len(recall.store):,} held"

        yield mine, keep
