"""One shard on disk: tokens, loss mask, span and annotations of its conversations, checked against its manifest."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.annotation_files import read_annotation, read_records
from megatron_vpmoe.data.annotations import Late
from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.manifest import FILE_NAME, ShardEntry
from megatron_vpmoe.teacher_records import TeacherRecords
from megatron_vpmoe.token_files import REBUILD, file_names, read_triple


class Shard:
    """The memory-mapped parts of one shard, found consistent with each other and with the manifest.

    Args:
        folder: of the split.
        entry: the manifest's; at least one row.
        annotations: that it has in files.
        teacher: how the records among them are read.

    Attributes:
        source: the shard's path without endings, for messages.
        lengths: int32 [rows]; tokens of each conversation.

    Raises:
        DataError: an index is damaged, or does not agree with its data, the other parts or the manifest.
    """

    def __init__(
        self,
        folder: Path,
        entry: ShardEntry,
        annotations: Sequence[Annotation] = (),
        teacher: TeacherRecords | None = None,
    ) -> None:
        self.source = str(folder / entry.name)
        self._triple = read_triple(folder, entry.name)
        self.lengths: NDArray[np.int32] = self._triple.lengths
        plain = [annotation for annotation in annotations if annotation.per != "record"]
        self._annotations = [(a, read_annotation(folder, entry.name, a, self.lengths)) for a in plain]
        self._teacher = teacher
        self._records = None if teacher is None else read_records(folder, entry.name, teacher, self._triple)
        found = (len(self.lengths), len(self._triple.tokens))
        if found != (entry.rows, entry.tokens):
            raise _damaged(
                f"the manifest counts {entry.rows} rows and {entry.tokens} tokens, the index {found[0]} and {found[1]}",
                f"{self.source}_tokens.idx",
            )
        shortest = int(self.lengths.argmin())
        if self.lengths[shortest] < 2:
            raise _damaged(
                f"conversation {shortest} has {self.lengths[shortest]} tokens; nothing can be predicted in it",
                f"{self.source}_tokens.idx",
            )

    def document(self, row: int) -> Document:
        """Conversation ``row`` of this shard, memory-mapped; a teacher's records are read once they are asked for."""
        triple, place = self._triple, self._triple.place(row)
        length = place.stop - place.start
        plain = {}
        for declared, (starts, values) in self._annotations:
            first, shape = int(starts[row]), declared.shape(length)
            plain[declared.name] = values[first : first + math.prod(shape)].reshape(shape)
        annotations: Mapping[str, NDArray[Any]] = plain
        if self._records is not None and self._teacher is not None:
            annotations = Late(plain, self._teacher.annotations, partial(self._records, row))
        core = triple.tokens[place], triple.lossmask[place], triple.span[place]
        return Document(*core, annotations=annotations)

    def answers_within(self, row: int, count: int) -> bool:
        """Whether an assistant's span of conversation ``row`` begins within its first ``count`` tokens."""
        return bool(self._triple.span[self._triple.place(row)][:count].any())

    def first_tokens(self, count: int) -> NDArray[np.int32]:
        """The first tokens of the shard, ``count`` of them or all."""
        return self._triple.tokens[:count]


def _damaged(what: str, source: Path | str) -> DataError:
    return DataError(what, source=str(source), remedy=REBUILD)


def check_files(folder: Path, shard: ShardEntry, annotations: Sequence[Annotation] = ()) -> None:
    """Refuse a shard whose files are not all there in the sizes that the manifest lists.

    Raises:
        DataError: one is missing, unlisted or of another size.
    """
    for path in (folder / name for name in file_names(shard.name, annotations)):
        listed = shard.files.get(path.name)
        if listed is None:
            raise _damaged(f"{path.name} is not in the manifest", folder.parent / FILE_NAME)
        if not path.is_file():
            raise _damaged(f"{path.name} is missing", path)
        size = path.stat().st_size
        if size != listed.bytes:
            raise _damaged(f"{path.name} has {size} bytes, the manifest says {listed.bytes}", path)


def check_ids(tokens: NDArray[np.int32], vocab_size: int, source: str) -> None:
    """Refuse ids outside [0, vocab_size).

    Raises:
        DataError: names one.
    """
    if len(tokens) and (int(tokens.max()) >= vocab_size or int(tokens.min()) < 0):
        bad = int(tokens.max()) if int(tokens.max()) >= vocab_size else int(tokens.min())
        raise _damaged(f"token id {bad} is outside the vocabulary of {vocab_size} ids", source)
