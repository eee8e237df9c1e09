"""Stored datasets as a source: this rank's micro-batches of the next global batch, and of the validation split.

The global order does not know of ranks. A global batch is the samples [consumed, consumed + global_batch_size) of the
order; micro-batch k of rank r holds the ``micro_batch_size`` samples from ``consumed + (k * dp_size + r) *
micro_batch_size`` on, as Megatron's own samplers have them. Any number of ranks therefore consumes the same samples
in every step, and a run may resume with another number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import PADDING, Batch, assemble
from megatron_vpmoe.data.blend import Blend, Part, as_stored
from megatron_vpmoe.data.mixture import Weights
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.runtime.device import has_gpu
from megatron_vpmoe.sources.interface import Position, Step

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

Wanted = Sequence[Annotation] | None


def weights_of(cfg: RunConfig) -> list[Weights]:
    """The weights of ``data.{blend, blend_schedule}``, from sample to sample."""
    first = Weights(0, [part.weight for part in cfg.data.parts])
    return [first, *(Weights(change.from_sample, change.weights) for change in cfg.data.blend_schedule or ())]


class _Rows:
    """Turns stretches of the global order into this rank's micro-batches."""

    def __init__(
        self,
        parts: Sequence[Part],
        weights: Sequence[Weights],
        cfg: RunConfig,
        dp_rank: int,
        dp_size: int,
        wanted: Wanted,
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} of {dp_size}")
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.micro_batch_size, self.seq_length = cfg.training.micro_batch_size, cfg.data.seq_length
        self.blend = Blend(
            parts, weights, seq_length=self.seq_length, window=cfg.data.packing_window, seed=cfg.data.data_seed
        )
        names = None if wanted is None else {one.name for one in wanted}
        self.annotations = tuple(one for one in self.blend.annotations if names is None or one.name in names)

    @property
    def samples_at_once(self) -> int:
        """Samples that one micro-batch of every rank takes together."""
        return self.micro_batch_size * self.dp_size

    def micro_batch(self, begin: int, end: int) -> Batch:
        """This rank's micro-batch of ``samples_at_once`` samples from ``begin`` on; padding from ``end`` on."""
        first = begin + self.dp_rank * self.micro_batch_size
        samples = [sample if sample < end else PADDING for sample in range(first, first + self.micro_batch_size)]
        rows = [[] if sample == PADDING else self.blend.documents(sample) for sample in samples]
        batch = assemble(
            rows,
            seq_length=self.seq_length,
            eod_id=self.blend.eod_id,
            sample_ids=samples,
            annotations=self.annotations,
        )
        return batch.pinned() if has_gpu() else batch


class _Stored:
    """What stored datasets give, to training and to validation."""

    depends_on_weights = False

    def __init__(self, rows: _Rows) -> None:
        self._rows = rows

    @property
    def annotations(self) -> tuple[Annotation, ...]:
        """Those that all datasets have (see ``Blend``) and that are wanted."""
        return self._rows.annotations


class StoredSource(_Stored):
    """Training batches of the datasets of a run, by cursor.

    Args:
        parts: the training splits, in the order of ``cfg.data.parts``.
        cfg: ``data`` and ``training.{micro,global}_batch_size`` are read.
        dp_rank: of this process among those that hold different data.
        dp_size: their number.
        wanted: annotations that batches carry where the datasets have them; None: all.

    Attributes:
        consumed_samples: rows of the global order that have been given; any value >= 0 may be set.

    Raises:
        ConfigError: ``global_batch_size`` is not a multiple of ``micro_batch_size * dp_size``.
    """

    def __init__(
        self, parts: Sequence[Part], cfg: RunConfig, dp_rank: int, dp_size: int, wanted: Wanted = None
    ) -> None:
        super().__init__(_Rows(parts, weights_of(cfg), cfg, dp_rank, dp_size, wanted))
        self.consumed_samples, self._closed = 0, False
        self.global_batch_size = cfg.training.global_batch_size
        if self.global_batch_size % self._rows.samples_at_once:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self._rows.micro_batch_size} x {dp_size} data-parallel ranks",
                source="training.global_batch_size",
                remedy=f"take a multiple of {self._rows.samples_at_once}",
            )

    def next_step(self) -> Step:
        """See ``Source``; metrics ``data/<name>/{samples,epoch}``."""
        begin, end = self.consumed_samples, self.consumed_samples + self.global_batch_size
        batches = []
        for first in range(begin, end, self._rows.samples_at_once):
            if self._closed:  # by another thread, which waits for this one and for no batch
                break
            batches.append(self._rows.micro_batch(first, end))
        cursors = self._rows.blend.cursors(end)
        samples = {f"data/{cursor.name}/samples": float(cursor.samples) for cursor in cursors}
        epochs = {f"data/{cursor.name}/epoch": float(cursor.epoch) for cursor in cursors}
        self.consumed_samples = end
        position = Position(end, as_stored(cursors))
        return Step(batches, lambda: position, {**samples, **epochs})

    def position(self, consumed_samples: int) -> Position:
        """Of a run that has consumed so many."""
        return Position(consumed_samples, as_stored(self._rows.blend.cursors(consumed_samples)))

    def resume(self, position: Position, *, source: str, allow_change: bool = False) -> list[str]:
        """See ``Source`` and ``Blend.resume``."""
        consumed, data, _ = position
        notes = self._rows.blend.resume(consumed, data, source=source, allow_change=allow_change)
        self.consumed_samples = consumed
        return notes

    def forget(self) -> None:
        """See ``Source``: nothing depends on weights."""

    def close(self) -> None:
        """Give up a step that is being made in another thread."""
        self._closed = True


class ValidSource(_Stored):
    """The validation split of one dataset, once and always in the same order; iterate it as often as needed.

    It holds the first ``eval_iters * global_batch_size`` rows of the split, or all of them if there are fewer. The last
    micro-batches are filled up with rows of padding, so that every rank does the same number of forward passes.

    Args:
        part: the validation split.
        cfg: as for ``StoredSource``, and ``evaluation.eval_iters``.
        dp_rank: of this process among those that hold different data.
        dp_size: their number.
        wanted: annotations that batches carry where the datasets have them; None: all.

    Attributes:
        samples: rows of the split that take part, over all ranks.
    """

    def __init__(self, part: Part, cfg: RunConfig, dp_rank: int, dp_size: int, wanted: Wanted = None) -> None:
        super().__init__(_Rows([part], [Weights(0, (1.0,))], cfg, dp_rank, dp_size, wanted))
        most = cfg.evaluation.eval_iters * cfg.training.global_batch_size
        self.samples = min(most, self._rows.blend.rows_of_one_epoch())

    def __len__(self) -> int:
        """Forward passes of each rank."""
        return -(-self.samples // self._rows.samples_at_once)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's micro-batches."""
        for begin in range(0, self.samples, self._rows.samples_at_once):
            yield self._rows.micro_batch(begin, self.samples)
