"""Rollouts as a source: answers of the model that is trained, scored against the others of their group.

A sampling draws prompts in the run's order, n answers to each, and their rewards; groups of equal rewards make way for
further prompts' a few times, and fill up what is missing in the end. The answers are then trained on, epoch by epoch,
in steps of ``global_batch_size`` answers, packed into rows.

Every rank holds all answers; a step's rows are shared out. A draw depends on (seed, number of the prompt in the order,
sample, position) and the weights, so a run that was killed samples the same again; between the steps of one sampling
its answers are part of the position, since the weights that gave them are gone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.batch import PADDING, Batch, assemble
from megatron_vpmoe.data.cursor import shuffled
from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.manifest import Manifest
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.replay import ROUTING, replaying
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.sources.answers import Answering, Answers
from megatron_vpmoe.sources.groups import (
    Advantage,
    Rollout,
    annotations_of,
    columns,
    from_columns,
    packed,
    varies,
    with_advantages,
)
from megatron_vpmoe.sources.interface import Position, Step
from megatron_vpmoe.sources.prompts import Prompts, in_order
from megatron_vpmoe.sources.reference import log_p_of_labels

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


class Rollouts:
    """Steps of sampled answers.

    Args:
        prompts: to draw from.
        manifest: of the training dataset: its vocabulary says what ends an answer.
        cfg: ``rollouts``, ``training.grpo_advantage``, ``data.seq_length`` and ``training.{micro,global}_batch_size``.
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
        replays = self._cfg.router_replay == "replay"
        self._answering = Answering(manifest, self._cfg, samples=self._cfg.rollout_group_size, record_routing=replays)
        self._advantage: Advantage = cfg.training.grpo_advantage
        self._seq_length, self._rows = cfg.data.seq_length, cfg.training.micro_batch_size
        self._answers, self._size = cfg.training.global_batch_size, self._cfg.rollout_group_size
        self._model: VPModel | None = None
        self.check: Callable[[], None] = lambda: None
        self.stop: StopRequest | None = None
        self._drawn = self._samplings = self._steps = self._done = 0
        self._rollouts: list[Rollout] = []
        self._arrays: dict[str, Any] = {}
        self._metrics: dict[str, float] = {}

    def open(self, model: VPModel) -> None:
        """Take the model that is trained."""
        self._model = model

    def next_step(self) -> Step:
        """See ``Source``; a collective. Metrics ``rollout/*`` of the sampling in each of its steps."""
        if not self._rollouts:
            self._metrics = self._sample()
        steps = len(self._rollouts) // self._answers
        epoch, part = divmod(self._done, steps)
        order = shuffled(len(self._rollouts), self._cfg.rollout_seed, self._samplings, epoch)
        chosen = order[part * self._answers : (part + 1) * self._answers].tolist()
        batches = [batch for batch, _ in self._laid_out([self._rollouts[place] for place in chosen])]
        self._steps += 1
        self._done = (self._done + 1) % (steps * self._cfg.rollout_epochs)
        if not self._done:
            self._rollouts, self._arrays = [], {}
        return Step(batches, self._position(), self._metrics)

    def _position(self) -> Position:
        counts = {"samplings": self._samplings, "steps": self._steps, "done": self._done}
        # Not the seconds: a position is the same on every rank, and after a resume.
        metrics = {tag: value for tag, value in self._metrics.items() if "seconds" not in tag and self._arrays}
        return Position(self._drawn, {"metrics": metrics, **counts}, self._arrays)

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
            return [f"{rest} sampled answers {why}: sampled anew"] * bool(rest)
        return [f"{len(self._rollouts)} sampled answers go on to be trained on"] if self._rollouts else []

    def close(self) -> None:
        """See ``Source``."""

    def _sample(self) -> dict[str, float]:
        """Fill ``_rollouts``; a collective. Returns metrics of everything that was sampled."""
        assert self._model is not None
        wanted, kept, spare, attempts = self._cfg.rollout_groups, [], [], 0
        every = Answers([], [])
        while len(kept) < wanted and attempts < self._cfg.rollout_attempts:
            asked = list(in_order(self._prompts, self._cfg.rollout_seed, self._drawn, wanted - len(kept)))
            answers = self._answering(self._model, asked, version=self._steps, stop=self.stop)
            self._drawn += len(asked)
            attempts += 1
            every.add(answers)
            for first in range(0, len(answers.rollouts), self._size):
                group = answers.rollouts[first : first + self._size]
                (kept if varies(group) else spare).append(group)
        # What teaches nothing keeps the step's size, with advantages of 0.
        kept += spare[: wanted - len(kept)]
        kept.sort(key=lambda group: group[0].group)
        whole = self._with_old([one for group in kept for one in with_advantages(group, self._advantage)])
        self._arrays = columns(whole)
        self._rollouts = from_columns(self._arrays)
        self._samplings, self._done = self._samplings + 1, 0
        metrics = {
            **every.metrics(),
            "groups_without_variance": len(spare) * self._size / len(every.rollouts),
            "attempts": float(attempts),
        }
        return {f"rollout/{tag}": value for tag, value in metrics.items()}

    @torch.no_grad()
    def _with_old(self, rollouts: list[Rollout]) -> list[Rollout]:
        """With what the trainer's forward pass makes of the weights that sampled; a collective."""
        model = self._model
        assert model is not None
        from megatron.core import parallel_state

        was_training = model.training
        model.eval()
        mine: dict[int, Any] = {}
        try:
            for batch, rows in self._laid_out(rollouts, every=True):
                self.check()
                with replaying(model, batch.annotations.get(ROUTING), batch.document_id):
                    log_p_BS = log_p_of_labels(model, batch, self._cfg.rollout_temperature).numpy()
                for row, places in enumerate(rows):
                    start = 0
                    for place in places:
                        span = rollouts[place].places
                        mine[place] = log_p_BS[row, start + span.start : start + span.stop].copy()
                        start += len(rollouts[place])
        finally:
            model.train(was_training)
        gathered: list[dict[int, Any]] = [mine]
        group = cast(dist.ProcessGroup, parallel_state.get_data_parallel_group())
        if group.size() > 1:
            gathered = [{} for _ in range(group.size())]
            dist.all_gather_object(gathered, mine, group=group)
        old = {place: values for part in gathered for place, values in part.items()}
        return [replace(one, old_log_p=old[place]) for place, one in enumerate(rollouts)]

    def _laid_out(self, rollouts: Sequence[Rollout], *, every: bool = False) -> list[tuple[Batch, list[list[int]]]]:
        """This rank's micro-batches of packed answers, and the places of the answers in their rows.

        Args:
            every: answers that are not trained on are supervised as well.
        """
        rank, ranks = self._of
        rows = packed([len(one) for one in rollouts], self._seq_length)
        at_once = self._rows * ranks
        batches = []
        for first in range(0, len(rows), at_once):
            numbers = range(first + rank * self._rows, first + (rank + 1) * self._rows)
            mine = [rows[number] if number < len(rows) else [] for number in numbers]
            batch = assemble(
                [[self._document(rollouts[place], every) for place in places] for places in mine],
                seq_length=self._seq_length,
                eod_id=self._manifest.tokenizer.eod_id,
                sample_ids=[number if number < len(rows) else PADDING for number in numbers],
                annotations=self.annotations,
            )
            batches.append((batch, mine))
        return batches

    def _document(self, rollout: Rollout, every: bool) -> Any:
        return rollout.document(trained=every or rollout.finished or not self._cfg.mask_truncated)
