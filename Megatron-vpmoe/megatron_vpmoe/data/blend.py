"""The datasets of a run as one endless order of samples: a blend, of which a single dataset is the simplest.

``Mixture`` says which dataset a sample comes from and which of that dataset's own samples it is; each dataset keeps the
``SampleOrder`` that it has alone. The whole order is a pure function of the datasets, the weights and ``data_seed``,
and its cursor is ``consumed_samples``; what a dataset has given so far follows from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import Document
from megatron_vpmoe.data.cursor import SampleOrder, WindowStart
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.data.mixture import Mixture, Weights
from megatron_vpmoe.data.pairs import documents_of, grouped_lengths
from megatron_vpmoe.errors import CheckpointError, DataError

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_ORDER_VERSION = 1
"""Of packing and shuffling: with another one, a dataset's windows begin elsewhere."""


class Part(NamedTuple):
    """One dataset of a blend.

    Attributes:
        name: in metrics and checkpoints.
        dataset: one split of it.
        skip: rows of its order that are passed over.
    """

    name: str
    dataset: KDDataset
    skip: int = 0


@dataclass(frozen=True)
class Cursor:
    """How far a dataset has been read.

    Attributes:
        name: of the dataset.
        samples: rows that it has given, without those passed over.
        epoch: passes over it that are complete.
        window: the packing window of the next row, counted over all epochs.
        window_first_sample: rows that the windows before it gave.
        order: identifies the dataset's own order; with another one, ``window`` means nothing.
    """

    name: str
    samples: int
    epoch: int
    window: int
    window_first_sample: int
    order: str


def open_parts(cfg: RunConfig, split: str) -> list[Part]:
    """Open one split of every dataset that ``cfg.data`` names; where some have a teacher's records, all declare them.

    Raises:
        DataError: a dataset is unusable, or two do not share a vocabulary.
        TokenizerError: their vocabulary is not the model's.
    """
    skips = (cfg.data.skip_rows if split == "train" else None) or [0] * len(cfg.data.parts)
    parts = [
        Part(part.label, KDDataset.open_at(part.path, cfg, split), skip)
        for part, skip in zip(cfg.data.parts, skips, strict=True)
    ]
    first = parts[0].dataset.manifest
    for part in parts[1:]:
        other = part.dataset.manifest
        differing = [
            key for key, value in first.tokenizer.identity().items() if other.tokenizer.identity()[key] != value
        ]
        if differing:
            raise DataError(
                f"two datasets of the blend do not share a vocabulary: {', '.join(differing)} of {other.root} is "
                f"{[other.tokenizer.identity()[key] for key in differing]}, of {first.root} "
                f"{[first.tokenizer.identity()[key] for key in differing]}",
                source=f"{first.path} and {other.path}: tokenizer",
                remedy=f"build one with the compact vocabulary of the other (--compact-map), or drop {part.name}",
            )
    told = (part.dataset.manifest.teacher for part in parts)
    records = next((teacher for teacher in told if teacher is not None), None)
    for part in parts:
        part.dataset.records = part.dataset.records or records
    return parts


class Blend:
    """What each sample of the global order holds. Not to be shared by threads.

    Args:
        parts: the datasets.
        weights: one for each part, from sample to sample.
        seq_length: positions of a row.
        window: conversations packed together.
        seed: of every dataset's own order.
    """

    def __init__(
        self, parts: Sequence[Part], weights: Sequence[Weights], *, seq_length: int, window: int, seed: int
    ) -> None:
        self.parts = list(parts)
        self._mixture = Mixture(weights)
        self._orders = [
            SampleOrder(
                grouped_lengths(part.dataset.lengths, part.dataset.manifest.group_size, seq_length=seq_length),
                seq_length=seq_length,
                window=window,
                seed=seed,
            )
            for part in parts
        ]
        self._identities = [
            _identity(part.dataset.manifest.sha256, part.dataset.split, seq_length, window, seed) for part in parts
        ]

    @property
    def eod_id(self) -> int:
        """The end-of-document token."""
        return self.parts[0].dataset.eod_id

    @property
    def annotations(self) -> tuple[Annotation, ...]:
        """Those that every dataset has, declared alike."""
        first, *others = (part.dataset.annotations for part in self.parts)
        return tuple(annotation for annotation in first if all(annotation in other for other in others))

    def documents(self, sample: int) -> list[Document]:
        """The conversations of row ``sample``, all of one dataset."""
        number, own = self._mixture.place(sample)
        _, dataset, skip = self.parts[number]
        indices = documents_of(self._orders[number].documents(skip + own), dataset.manifest.group_size)
        return [dataset[int(index)] for index in indices]

    def rows_of_one_epoch(self) -> int:
        """Rows in one pass over the first dataset; packs them all."""
        return self._orders[0].first_sample_of_epoch(1)

    def cursors(self, consumed_samples: int) -> list[Cursor]:
        """How far each dataset has been read once ``consumed_samples`` samples are."""
        cursors = []
        for number, samples in enumerate(self._mixture.counts(consumed_samples)):
            order = self._orders[number]
            start = order.start_of(self.parts[number].skip + samples)
            epoch = order.epoch_of(start)
            cursors.append(Cursor(self.parts[number].name, samples, epoch, *start, self._identities[number]))
        return cursors

    def resume(self, consumed_samples: int, stored: object, *, source: str, allow_change: bool = False) -> list[str]:
        """Go to ``consumed_samples`` with the cursors that a checkpoint stored, instead of packing all before it.

        Args:
            stored: what ``as_stored`` gave; an empty list for a checkpoint that has none.
            source: the checkpoint, for messages.
            allow_change: go on although the datasets or the weights of what has been trained are others.

        Returns:
            lines for the log, such as which dataset's position has to be found by packing again.

        Raises:
            CheckpointError: ``stored`` holds no cursors, or not those of ``consumed_samples`` under these weights.
        """
        notes, cursors = [], _read_cursors(stored, source=f"{source}: data")
        given = [cursor.samples for cursor in cursors]
        if cursors and not self._mixture.may_have_given(consumed_samples, given):
            shares = zip(self.parts, self._mixture.shares(consumed_samples), strict=True)
            due = ", ".join(f"{part.name} {float(share):g}" for part, share in shares)
            found = ", ".join(f"{cursor.name} {cursor.samples}" for cursor in cursors)
            what = f"{consumed_samples} samples under these weights are {due}; the checkpoint has {found}"
            if not allow_change:
                raise CheckpointError(
                    what,
                    source=f"{source}: data",
                    remedy="keep the weights of what has been trained; blend_schedule changes them from a sample on",
                )
            notes.append(what)
            cursors = []
        if cursors:
            self._mixture.go_to(consumed_samples, given)
        counts = self._mixture.counts(consumed_samples)
        for number, part in enumerate(self.parts):
            cursor = cursors[number] if cursors else None
            if cursor is None or cursor.order != self._identities[number]:
                if counts[number]:
                    notes.append(f"{part.name}: its order was not stored, packing the rows behind the cursor again")
                continue
            start = WindowStart(cursor.window, cursor.window_first_sample)
            try:
                self._orders[number].go_to(start, part.skip + counts[number])
            except ValueError as error:
                raise CheckpointError(
                    f"the cursor of {part.name} contradicts its dataset: {error}",
                    source=f"{source}: data",
                    remedy="resume from another checkpoint",
                ) from error
        return notes


def as_stored(cursors: Sequence[Cursor]) -> list[dict[str, Any]]:
    """Cursors for a checkpoint, JSON-ready."""
    return [asdict(cursor) for cursor in cursors]


def _read_cursors(stored: object, *, source: str) -> list[Cursor]:
    try:
        return TypeAdapter(list[Cursor]).validate_python(stored)
    except ValidationError as error:
        raise CheckpointError(
            f"these are no cursors: {str(stored)[:80]}",
            source=source,
            remedy="resume with the objective that wrote it, or start from its weights (checkpoint.load_weights)",
        ) from error


def _identity(*order: str | int) -> str:
    return hashlib.sha256(repr((_ORDER_VERSION, *order)).encode()).hexdigest()[:16]
