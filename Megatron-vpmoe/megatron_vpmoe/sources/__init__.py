"""What the loop asks for the next step: stored datasets, and whatever else gives batches.

A source yields this rank's micro-batches step by step, with the position that a checkpoint keeps. It says whether its
batches come from the weights that are trained; if not, steps are prepared in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_vpmoe.annotation import Annotation
from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.sources.ahead import Ahead, ahead
from megatron_vpmoe.sources.annotated import Annotated, AnnotatedBatches, Annotator
from megatron_vpmoe.sources.beside import Beside
from megatron_vpmoe.sources.curriculum import modes_of
from megatron_vpmoe.sources.form import check_collapse
from megatron_vpmoe.sources.held_out import HeldOut
from megatron_vpmoe.sources.interface import Batches, Gives, Position, Source, Step, check_needs
from megatron_vpmoe.sources.prompts import Prompts, open_prompts
from megatron_vpmoe.sources.reference import FrozenModel, Reference, Teacher
from megatron_vpmoe.sources.rewarded import Rewarded
from megatron_vpmoe.sources.rollouts import Rollouts
from megatron_vpmoe.sources.served import Passage, Served, Server
from megatron_vpmoe.sources.stored import StoredSource, ValidSource
from megatron_vpmoe.sources.taught import Taught

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

__all__ = [
    "Ahead",
    "Annotated",
    "AnnotatedBatches",
    "Annotator",
    "Batches",
    "Beside",
    "FrozenModel",
    "Gives",
    "HeldOut",
    "Passage",
    "Position",
    "Reference",
    "Rewarded",
    "Rollouts",
    "Served",
    "Server",
    "Source",
    "Step",
    "StoredSource",
    "Taught",
    "Teacher",
    "ValidSource",
    "ahead",
    "check_collapse",
    "check_needs",
    "open_held_out",
    "open_source",
]


def open_source(
    parts: Sequence[Part], cfg: RunConfig, dp_rank: int, dp_size: int, wanted: Sequence[Annotation] | None = None
) -> Source:
    """The training source of a run: answers of its own model, which rewards or a teacher score, or stored datasets.

    Answers are to the prompts of ``rollouts.rollout_prompts``, or of the first dataset. Batches of stored datasets
    carry of their annotations those that are ``wanted``; None: all.
    """
    if cfg.samples:
        modes = modes_of(cfg.rollouts.curriculum or ())
        prompts = _prompts(parts[0], cfg.rollouts.rollout_prompts, cfg, modes)
        if cfg.training.objective == "on_policy":
            return Taught(prompts, parts, cfg, dp_rank, dp_size)
        return Rewarded(prompts, parts[0].dataset.manifest, cfg, dp_rank, dp_size)
    return ahead(StoredSource(parts, cfg, dp_rank, dp_size, wanted))


def open_held_out(parts: Sequence[Part], cfg: RunConfig) -> HeldOut | None:
    """What measures answers to prompts of ``rollouts.rollout_valid_prompts``, or of the first validation split.

    None where no answers are trained on, or validation is not asked for.
    """
    if not cfg.samples or (cfg.evaluation.eval_interval is None and not cfg.evaluation.eval_at_start):
        return None
    return HeldOut(_prompts(parts[0], cfg.rollouts.rollout_valid_prompts, cfg), parts[0].dataset.manifest, cfg)


def _prompts(part: Part, path: str | None, cfg: RunConfig, modes: Sequence[str] = ()) -> Prompts:
    return open_prompts(part.dataset, path, cfg.data.seq_length - cfg.rollouts.rollout_max_new_tokens, modes)
