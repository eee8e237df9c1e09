"""Rollouts as a source: answers of the model that is trained, trained on epoch by epoch in packed rows.

A sampling draws prompts in the run's order and answers to each; what else belongs to it is the subclasses'. Its answers
are trained on in steps of ``global_batch_size`` answers.

Every rank holds all answers; a step's rows are shared out. A draw depends on (seed, number of the prompt in the order,
sample, position) and the weights, so a run that was killed samples the same again; between the steps of one sampling
its answers are part of the position, since the weights that gave them are gone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import PADDING, Batch, Document, assemble
from megatron_vpmoe.data.cursor import shuffled
from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.sources.answers import Answering
from megatron_vpmoe.sources.groups import Rollout, annotations_of, columns, from_columns, packed
from megatron_vpmoe.sources.interface import Position, Step
from megatron_vpmoe.sources.prompts import Prompts

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_Row = TypeVar("_Row")


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
        self._drawn = self._samplings = self._steps = self._done = 0
        self._rollouts: list[Rollout] = []
        self._arrays: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}

    @abstractmethod
    def _sample(self) -> tuple[list[Rollout], dict[str, float]]:
        """The answers of the next sampling, and ``rollout/*`` of it; a collective that moves ``_drawn`` on."""

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

    def open(self, model: VPModel) -> None:
        """Take the model that is trained."""
        self._model = model

    def next_step(self) -> Step:
        """See ``Source``; a collective. Metrics ``rollout/*`` of the sampling in each of its steps."""
        if not self._rollouts:
            sampled, self._metrics = self._sample()
            self._arrays = columns(sampled)
            self._rollouts = from_columns(self._arrays)
            self._samplings, self._done = self._samplings + 1, 0
        steps = len(self._rollouts) // self._answers
        epoch, part = divmod(self._done, steps)
        order = shuffled(len(self._rollouts), self._cfg.rollout_seed, self._samplings, epoch)
        chosen = order[part * self._answers : (part + 1) * self._answers].tolist()
        rows, metrics = self._rows_of([self._rollouts[place] for place in chosen])
        batches = [self._batch(mine, numbers) for mine, numbers in self._shared_out(rows)]
        self._steps += 1
        self._done = (self._done + 1) % (steps * self._cfg.rollout_epochs)
        if not self._done:
            self._rollouts, self._arrays = [], {}
        return Step(batches, self._position(), {**self._metrics, **metrics})

    def _position(self) -> Position:
        counts = {"samplings": self._samplings, "steps": self._steps, "done": self._done}
        # Not the seconds: a position is the same on every rank, and after a resume.
        metrics = {tag: value for tag, value in self._metrics.items() if "seconds" not in tag and self._arrays}
        return Position(self._drawn, {"metrics": metrics, **counts, **self._kept()}, self._arrays)

    def resume(self, position: Position, *, source: str, allow_change: bool = False) -> list[str]:
        """See ``Source``."""
        data = position.data
        if position.consumed_samples == 0 and not data:
            return []
        try:
            self._samplings, self._steps, self._done = (int(data[name]) for name in ("samplings", "steps", "done"))
            self._arrays = dict(position.arrays)
            self._rollouts = from_columns(self._arrays) if self._arrays else []
            self._metrics = {tag: float(value) for tag, value in data["metrics"].items()}
            notes = self._restore(data, source=source, allow_change=allow_change)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f"the position is of no rollouts: {error!r}",
                source=source,
                remedy="resume with the objective that wrote it, or start from its weights (checkpoint.load_weights)",
            ) from error
        self._drawn, steps = position.consumed_samples, len(self._rollouts) // self._answers
        unrecorded = self._cfg.router_replay == "replay" and any(len(one.routing) == 0 for one in self._rollouts)
        if unrecorded or len(self._rollouts) % self._answers or self._done >= steps * self._cfg.rollout_epochs:
            rest, self._rollouts, self._arrays = len(self._rollouts), [], {}
            why = "went to experts unknown" if unrecorded else "are no whole number of steps now"
            return [*notes, *[f"{rest} sampled answers {why}: sampled anew"] * bool(rest)]
        told = [f"{len(self._rollouts)} sampled answers go on to be trained on"] if self._rollouts else []
        return [*notes, *told]

    def close(self) -> None:  # noqa: B027
        """See ``Source``."""

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
