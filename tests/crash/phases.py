"""The phases of a run, as points at which it is killed, and the two runs that have them: stored data, and rollouts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tests.crash.points import Point

SMALL = {
    "num_layers": 2,
    "train_iters": 10,
    "save_interval": 2,
    "eval_interval": 4,
    "sample_interval": 4,
    "sample_prompts": 2,
    "sample_max_new_tokens": 4,
    "keep_last": 1,
}
"""Experts in the second layer; ten steps of two micro-batches, of one on each of two processes."""
SAMPLED: dict[str, Any] = {
    **SMALL,
    "objective": "grpo",
    "rewards": [{"function": "tests.training_runs:even_tokens"}],
    "rollout_groups": 4,
    "rollout_group_size": 4,
    "rollout_epochs": 2,
    "rollout_max_new_tokens": 8,
    "router_replay": "replay",
    "global_batch_size": 8,
    "train_iters": 6,
    "sample_interval": None,
    "eval_interval": None,
}
"""Four steps a sampling, so that the second begins within the run and a checkpoint lies within one."""
_MICRO_BATCH = "megatron_vpmoe.objectives.span_ce:SpanCE.__call__"
_STANDS = Point("rename", "latest_checkpointed_iteration.txt$")
BEGUN = (_STANDS, _STANDS, Point(_MICRO_BATCH))
"""After the second checkpoint of the run on stored data."""


@dataclass(frozen=True)
class Phase:
    """Where a run is killed.

    Args:
        name: for people.
        points: how the instant is found.
        leads: rank 0 alone comes there.
        sampled: of the run on its own answers.
        beside: a checkpoint is written beside training. In other phases one process waits for its saves; two do not.
    """

    name: str
    points: tuple[Point, ...]
    leads: bool = False
    sampled: bool = False
    beside: bool = False


def _of_a_save(name: str, what: str, path: str) -> Phase:
    return Phase(name, (Point(what, path),), leads=True)


PHASES = (
    _of_a_save("start-up: before the run is described", "rename", r"/config\.yaml$"),
    _of_a_save("tracker: the checkpoint stands, it does not say so", "rename", "latest_checkpointed_iteration.txt$"),
    Phase("start-up: before a checkpoint is read", (Point("megatron_vpmoe.training.checkpoint:load"),)),
    _of_a_save("start-up: the log is cut to the checkpoint", "rename", r"/metrics\.jsonl$"),
    Phase("mid-step: between micro-batches", (Point(_MICRO_BATCH, count=2),)),
    Phase("mid-step: before the update", (Point("megatron_vpmoe.optim:VpOptimizer.update"),)),
    Phase(
        "data: within a file",
        (
            Point("open", r"\.partial/__\d_0\.distcp"),
            Point("torch.distributed.checkpoint.filesystem:_write_item", count=20),
        ),
    ),
    Phase("data: written, not on disk", (Point("fsync", r"\.partial/__\d_0\.distcp"),)),
    _of_a_save("metadata: where tensors are", "open", r"\.partial/\.metadata"),
    _of_a_save("metadata: the run's state", "rename", r"/run_state\.json$"),
    _of_a_save("metadata: the list of files", "rename", r"/files\.json$"),
    _of_a_save("metadata: before it has its name", "rename", r"/iter_\d+$"),
    _of_a_save("tracker: written", "fsync", "/checkpoints$"),
    _of_a_save("pruning: renamed", "rename", r"\.pruned$"),
    Phase("pruning: half removed", (Point("rename", r"\.pruned$"), Point("rmdir", "^assets$")), leads=True),
    Phase(
        "asynchronous save under way",
        (Point("megatron_vpmoe.training.checkpoint_part:Part.write", holds=True), Point(_MICRO_BATCH)),
        beside=True,
    ),
    Phase("evaluation", (Point("megatron_vpmoe.training.evaluate:evaluate"), Point(_MICRO_BATCH, count=2))),
    Phase(
        "samples", (Point("megatron_vpmoe.training.samples:generate"), Point("open", r"samples\.jsonl$")), leads=True
    ),
    Phase(
        "sampling of a rollout",
        (
            Point("megatron_vpmoe.training.run:Run.save"),
            Point("megatron_vpmoe.generation.engine:_Engine._step", count=3),
        ),
        sampled=True,
    ),
    Phase("end: the last save is waited for", (Point("megatron_vpmoe.training.saving:Saving.wait"),)),
    Phase("end: before it is told", (Point("megatron_vpmoe.training.progress:Progress.finished"),)),
    Phase("end: before the processes part", (Point("megatron_vpmoe.runtime.distributed:shutdown"),)),
)
