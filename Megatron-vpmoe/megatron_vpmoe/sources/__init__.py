"""What the loop asks for the next step: stored datasets, and whatever else gives batches.

A source yields this rank's micro-batches step by step, with the position that a checkpoint keeps. It says whether its
batches come from the weights that are trained; if not, steps are prepared in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.sources.ahead import Ahead, ahead
from megatron_vpmoe.sources.annotated import Annotated, AnnotatedBatches, Annotator
from megatron_vpmoe.sources.interface import Batches, Gives, Position, Source, Step, check_needs
from megatron_vpmoe.sources.prompts import StoredPrompts, read_prompts
from megatron_vpmoe.sources.reference import Reference
from megatron_vpmoe.sources.rollouts import Rollouts
from megatron_vpmoe.sources.stored import StoredSource, ValidSource

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

__all__ = [
    "Ahead",
    "Annotated",
    "AnnotatedBatches",
    "Annotator",
    "Batches",
    "Gives",
    "Position",
    "Reference",
    "Rollouts",
    "Source",
    "Step",
    "StoredSource",
    "ValidSource",
    "ahead",
    "check_needs",
    "open_source",
]


def open_source(parts: Sequence[Part], cfg: RunConfig, dp_rank: int, dp_size: int) -> Source:
    """The training source of a run: answers of its own model where ``rollouts.rewards`` names any, or stored datasets.

    Answers are to the prompts of ``rollouts.rollout_prompts``, or of the first dataset.
    """
    if cfg.rollouts.rewards is not None:
        dataset, path = parts[0].dataset, cfg.rollouts.rollout_prompts
        size = dataset.manifest.tokenizer.vocab_size
        prompts = StoredPrompts(dataset) if path is None else read_prompts(Path(path), vocab_size=size)
        return Rollouts(prompts, dataset.manifest, cfg, dp_rank, dp_size)
    return ahead(StoredSource(parts, cfg, dp_rank, dp_size))
