"""Rollouts as a source: answers of the model that is trained, trained on epoch by epoch in packed rows.

A sampling draws prompts in the run's order and answers to each; what else belongs to it is the subclasses'. Its answers
are trained on in steps of ``global_batch_size`` answers.

Every rank holds all answers; a step's rows are shared out. A draw depends on (seed, number of the prompt in the order,
sample, position) and the weights, so a run that was killed samples the same again; between the steps of one sampling
its answers are part of the position, since the weights that gave them are gone.

With ``rollout_staleness`` k the next sampling begins k updates before its first use, with the weights as they then are,
and goes on beside those updates: what is learned from follows from k and from no clock. A position waits for it.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import PADDING, Batch, Document, assemble
from megatron_vpmoe.data.cursor import shuffled
from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.sources.answers import Answering
from megatron_vpmoe.sources.beside import Beside
from megatron_vpmoe.sources.groups import Rollout, annotations_of, packed
from megatron_vpmoe.sources.interface import Position, Step
from megatron_vpmoe.sources.prompts import Prompts
from megatron_vpmoe.sources.sampling import Reached, Sampler, Sampling

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_Row = TypeVar("_Row")
_NEXT = "next."
"""Before the names of arrays of a sampling that waits for its first use."""


class Rollouts(ABC):
    """Steps of sampled answers.

    Args:
        prompts: to draw from.
        manifest: of the training dataset: its vocabulary says what ends an answer.
        cfg: ``rollouts``, ``data.seq_length`` and ``training.{micro,global}_batch_size``.
        dp_rank: of this process among those that hold different data.
        dp_size: their number.

    Attributes:
        check: called before each forward pass; may raise.
        stop: asked before each sampled token.

    Raises:
        ConfigError: a reward cannot be had.
    """

    annotations: tuple[Annotation, ...]
    depends_on_weights = True

    def __init__(self, prompts: Prompts, manifest: Manifest, cfg: RunConfig, dp_rank: int, dp_size: int) -> None:
        self._prompts, self._manifest, self._cfg, self._of = prompts, manifest, cfg.rollouts, (dp_rank, dp_size)
        self.annotations = annotations_of(cfg)
        self._answering = Answering(manifest, self._cfg, record_routing=self._cfg.router_replay == "replay")
        self._seq_length, self._rows = cfg.data.seq_length, cfg.training.micro_batch_size
        self._answers = cfg.training.global_batch_size
        self._model: VPModel | None = None
        self.check: Callable[[], None] = lambda: None
        self.stop: StopRequest | None = None
        self._samplings = self._steps = self._done = 0
        self._reached = Reached()
        self._sampling: Sampling | None = None
        self._next: Callable[[], Sampling] | None = None
        self._beside: Beside | None = None

    @abstractmethod
    def _sample(self, begin: Reached, by: Sampler) -> Sampling:
        """The next sampling; a collective, on any thread: it changes nothing of the source."""

    def _rows_of(self, chosen: Sequence[Rollout]) -> tuple[list[list[Document]], dict[str, float]]:
        """The rows of a step of these answers, and metrics of the step."""
        return [[self._document(chosen[place]) for place in places] for places in self._packed(chosen)], {}

    def _kept(self) -> dict[str, Any]:
        """What else a position keeps, JSON-ready."""
        return {}

    def _restore(self, data: dict[str, Any], *, source: str, allow_change: bool) -> list[str]:
        """Go on from what ``_kept`` gave; returns lines for the log.

        Raises:
            KeyError, TypeError, ValueError, AttributeError: it is something else.
        """
        return []

    def open(self, model: VPModel, beside: Beside | None = None) -> None:
        """Take the model that is trained, and with ``rollout_staleness`` what samples beside it."""
        self._model, self._beside = model, beside

    def next_step(self) -> Step:
        """See ``Source``; a collective. Metrics ``rollout/*`` of the sampling in each of its steps."""
        began = time.perf_counter()
        if self._sampling is None:
            self._sampling = self._next() if self._next else self._sample(self._reached, self._of_now())
            self._next, self._reached = None, self._sampling.reached
            self._samplings, self._done = self._samplings + 1, 0
        waited, rollouts, metrics = time.perf_counter() - began, self._sampling.rollouts, self._sampling.metrics
        steps = len(rollouts) // self._answers
        uses = steps * self._cfg.rollout_epochs
        if self._beside is not None:
            if self._next is None and uses - self._done <= self._cfg.rollout_staleness:
                self._next = self._beside.begin(partial(self._sample, self._reached), self._steps)
            age = self._steps - rollouts[0].weight_version
            metrics = {**metrics, "rollout/staleness": float(age), "rollout/seconds_waiting": waited}
        epoch, part = divmod(self._done, steps)
        order = shuffled(len(rollouts), self._cfg.rollout_seed, self._samplings, epoch)
        chosen = order[part * self._answers : (part + 1) * self._answers].tolist()
        rows, of_step = self._rows_of([rollouts[place] for place in chosen])
        batches = [self._batch(mine, numbers) for mine, numbers in self._shared_out(rows)]
        self._steps += 1
        self._done = (self._done + 1) % uses
        if not self._done:
            self._sampling = None
        return Step(batches, self._position(), {**metrics, **of_step})

    def _of_now(self) -> Sampler:
        assert self._model is not None
        return Sampler(self._model, self._steps, self.stop, self.check)

    def _position(self) -> Callable[[], Position]:
        """That of now, whenever it is asked for."""
        kept = {"samplings": self._samplings, "steps": self._steps, "done": self._done, **self._kept()}
        now, following, reached = self._sampling, self._next, self._reached

        def position() -> Position:
            after = None if following is None else following()
            drawn, tokens = reached if after is None else after.reached
            data = {"metrics": {} if now is None else now.told(), **kept, "sampled": tokens}
            arrays = {} if now is None else dict(now.arrays)
            if after is not None:
                data["next"] = after.told()
                arrays |= {f"{_NEXT}{name}": array for name, array in after.arrays.items()}
            return Position(drawn, data, arrays)

        return position

    def resume(self, position: Position, *, source: str, allow_change: bool = False) -> list[str]:
        """See ``Source``."""
        data = position.data
        if position.consumed_samples == 0 and not data:
            return []
        try:
            self._samplings, self._steps, self._done = (int(data[name]) for name in ("samplings", "steps", "done"))
            self._reached = Reached(position.consumed_samples, int(data.get("sampled", 0)))
            ahead = {name.removeprefix(_NEXT): a for name, a in position.arrays.items() if name.startswith(_NEXT)}
            now = {name: array for name, array in position.arrays.items() if not name.startswith(_NEXT)}
            kept = Sampling.kept(now, data["metrics"], self._reached)
            kept_ahead = Sampling.kept(ahead, data.get("next", {}), self._reached)
            notes = self._restore(data, source=source, allow_change=allow_change)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the position is of no rollouts: {error!r}",
                source=source,
                remedy="resume with the objective that wrote it, or start from its weights (checkpoint.load_weights)",
            ) from error
        self._sampling, following = self._usable(kept, self._done, notes), self._usable(kept_ahead, 0, notes)
        self._next = None if following is None else lambda: following
        return notes

    def _usable(self, sampling: Sampling | None, done: int, notes: list[str]) -> Sampling | None:
        """A kept sampling if it can still be trained on, ``done`` of its steps being done; appends to ``notes``."""
        if sampling is None:
            return None
        rest, unusable = len(sampling.rollouts), ""
        if self._cfg.router_replay == "replay" and any(len(one.routing) == 0 for one in sampling.rollouts):
            unusable = "went to experts unknown"
        elif rest % self._answers or done >= rest // self._answers * self._cfg.rollout_epochs:
            unusable = "are no whole number of steps now"
        told = f"{unusable}: sampled anew" if unusable else "go on to be trained on"
        notes.append(f"{rest} sampled answers {told}")
        return None if unusable else sampling

    def forget(self) -> None:
        """See ``Source``: the answers in hand are dropped, and the next ones are to the prompts after theirs.

        Also after those of a sampling that waits for its first use: a position counts them as consumed.
        """
        if self._next is not None:
            self._reached = self._next().reached
        self._sampling = self._next = None
        self._done = 0

    def close(self) -> None:
        """See ``Source``."""
        if self._beside is not None:
            self._beside.close()

    def _packed(self, rollouts: Sequence[Rollout]) -> list[list[int]]:
        """Their places by row."""
        return packed([len(one) for one in rollouts], self._seq_length)

    def _shared_out(self, rows: Sequence[list[_Row]]) -> Iterator[tuple[list[list[_Row]], list[int]]]:
        """This rank's rows of each micro-batch, with their numbers; an empty one where there is no row left."""
        rank, ranks = self._of
        at_once = self._rows * ranks
        for first in range(0, len(rows), at_once):
            wanted = range(first + rank * self._rows, first + (rank + 1) * self._rows)
            numbers = [number if number < len(rows) else PADDING for number in wanted]
            yield [[] if number == PADDING else rows[number] for number in numbers], numbers

    def _batch(self, rows: Sequence[Sequence[Document]], numbers: Sequence[int]) -> Batch:
        return assemble(
            rows,
            seq_length=self._seq_length,
            eod_id=self._manifest.tokenizer.eod_id,
            sample_ids=numbers,
            annotations=self.annotations,
        )

    def _document(self, rollout: Rollout) -> Document:
        return rollout.document(trained=self._is_trained_on(rollout))

    def _is_trained_on(self, rollout: Rollout) -> bool:
        return rollout.finished or not self._cfg.mask_truncated
