"""Batch sources: this rank's micro-batches of the next global batch, and of the validation split.

The global order does not know of ranks. A global batch is the samples [consumed, consumed + global_batch_size) of the
order; micro-batch k of rank r holds the ``micro_batch_size`` samples from ``consumed + (k * dp_size + r) *
micro_batch_size`` on, as Megatron's own samplers have them. Any number of ranks therefore consumes the same samples
in every step, and a run may resume with another number.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

from megatron_vpmoe.data.batch import PADDING, Batch, assemble
from megatron_vpmoe.data.blend import Blend, Cursor, Part
from megatron_vpmoe.data.mixture import Weights
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.runtime.device import has_gpu

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


def weights_of(cfg: RunConfig) -> list[Weights]:
    """The weights of ``data.{blend, blend_schedule}``, from sample to sample."""
    first = Weights(0, [part.weight for part in cfg.data.parts])
    return [first, *(Weights(change.from_sample, change.weights) for change in cfg.data.blend_schedule or ())]


class _Rows:
    """Turns stretches of the global order into this rank's micro-batches."""

    def __init__(
        self, parts: Sequence[Part], weights: Sequence[Weights], cfg: RunConfig, dp_rank: int, dp_size: int
    ) -> None:
        if not 0 <= dp_rank < dp_size:
            raise ValueError(f"data-parallel rank {dp_rank} of {dp_size}")
        self.dp_rank, self.dp_size = dp_rank, dp_size
        self.micro_batch_size, self.seq_length = cfg.training.micro_batch_size, cfg.data.seq_length
        self.blend = Blend(
            parts, weights, seq_length=self.seq_length, window=cfg.data.packing_window, seed=cfg.data.data_seed
        )

    @property
    def samples_at_once(self) -> int:
        """Samples that one micro-batch of every rank takes together."""
        return self.micro_batch_size * self.dp_size

    def micro_batch(self, begin: int, end: int) -> Batch:
        """This rank's micro-batch of ``samples_at_once`` samples from ``begin`` on; padding from ``end`` on."""
        first = begin + self.dp_rank * self.micro_batch_size
        samples = [sample if sample < end else PADDING for sample in range(first, first + self.micro_batch_size)]
        rows = [[] if sample == PADDING else self.blend.documents(sample) for sample in samples]
        batch = assemble(rows, seq_length=self.seq_length, eod_id=self.blend.eod_id, sample_ids=samples)
        return batch.pinned() if has_gpu() else batch


class BatchSource:
    """Training batches by cursor. The step after the one asked for is prepared by a thread meanwhile.

    Args:
        parts: the training splits, in the order of ``cfg.data.parts``.
        cfg: ``data`` and ``training.{micro,global}_batch_size`` are read.
        dp_rank: of this process among those that hold different data.
        dp_size: their number.

    Raises:
        ConfigError: ``global_batch_size`` is not a multiple of ``micro_batch_size * dp_size``.
    """

    def __init__(self, parts: Sequence[Part], cfg: RunConfig, dp_rank: int, dp_size: int) -> None:
        self._rows = _Rows(parts, weights_of(cfg), cfg, dp_rank, dp_size)
        self.global_batch_size = cfg.training.global_batch_size
        if self.global_batch_size % self._rows.samples_at_once:
            raise ConfigError(
                f"global_batch_size {self.global_batch_size} is not a multiple of micro_batch_size "
                f"{self._rows.micro_batch_size} x {dp_size} data-parallel ranks",
                source="training.global_batch_size",
                remedy=f"take a multiple of {self._rows.samples_at_once}",
            )
        # One thread does all the reading, so the order and the memory maps are never used by two at once.
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._ahead: tuple[int, Future[tuple[list[Batch], list[Cursor]]]] | None = None
        self._behind: tuple[int, list[Cursor]] | None = None

    def next_step(self, consumed_samples: int) -> list[Batch]:
        """This rank's micro-batches of the global batch that begins at ``consumed_samples`` (any value >= 0).

        Raises:
            DataError: a conversation that does not hold what its dataset promises.
        """
        if self._ahead is not None and self._ahead[0] == consumed_samples:
            pending = self._ahead[1]
        else:
            pending = self._worker.submit(self._prepare, consumed_samples)
        self._ahead = None
        batches, cursors = pending.result()
        following = consumed_samples + self.global_batch_size
        self._behind = following, cursors
        self._ahead = following, self._worker.submit(self._prepare, following)
        return batches

    def cursors(self, consumed_samples: int) -> list[Cursor]:
        """How far each dataset has been read at ``consumed_samples``; at once for the end of the step given last."""
        if self._behind is not None and self._behind[0] == consumed_samples:
            return self._behind[1]
        return self._worker.submit(self._rows.blend.cursors, consumed_samples).result()

    def resume(self, consumed_samples: int, stored: object, *, source: str, allow_change: bool = False) -> list[str]:
        """Go on from a checkpoint's cursors; see ``Blend.resume``."""
        resume = self._rows.blend.resume
        return self._worker.submit(resume, consumed_samples, stored, source=source, allow_change=allow_change).result()

    def close(self) -> None:
        """End the thread; a step prepared in advance is dropped."""
        self._ahead = None
        self._worker.shutdown(wait=True, cancel_futures=True)

    def prepare(self, consumed_samples: int) -> list[Batch]:
        """What ``next_step`` gives, made in the calling thread; for a source that is used in no other way."""
        end = consumed_samples + self.global_batch_size
        return [
            self._rows.micro_batch(begin, end) for begin in range(consumed_samples, end, self._rows.samples_at_once)
        ]

    def _prepare(self, consumed_samples: int) -> tuple[list[Batch], list[Cursor]]:
        batches = self.prepare(consumed_samples)
        return batches, self._rows.blend.cursors(consumed_samples + self.global_batch_size)


class ValidSource:
    """The validation split of one dataset, once and always in the same order; iterate it as often as needed.

    It holds the first ``eval_iters * global_batch_size`` rows of the split, or all of them if there are fewer. The last
    micro-batches are filled up with rows of padding, so that every rank does the same number of forward passes.

    Args:
        part: the validation split.
        cfg: as for ``BatchSource``, and ``evaluation.eval_iters``.
        dp_rank: of this process among those that hold different data.
        dp_size: their number.

    Attributes:
        samples: rows of the split that take part, over all ranks.
    """

    def __init__(self, part: Part, cfg: RunConfig, dp_rank: int, dp_size: int) -> None:
        self._rows = _Rows([part], [Weights(0, (1.0,))], cfg, dp_rank, dp_size)
        wanted = cfg.evaluation.eval_iters * cfg.training.global_batch_size
        self.samples = min(wanted, self._rows.blend.rows_of_one_epoch())

    def __len__(self) -> int:
        """Forward passes of each rank."""
        return -(-self.samples // self._rows.samples_at_once)

    def __iter__(self) -> Iterator[Batch]:
        """This rank's micro-batches."""
        for begin in range(0, self.samples, self._rows.samples_at_once):
            yield self._rows.micro_batch(begin, self.samples)
