"""What the loop asks for the next step: stored datasets, and whatever else gives batches.

A source yields this rank's micro-batches step by step, with the position that a checkpoint keeps. It says whether its
batches come from the weights that are trained; if not, steps are prepared in advance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_vpmoe.data.blend import Part
from megatron_vpmoe.sources.ahead import Ahead, ahead
from megatron_vpmoe.sources.annotated import Annotated, AnnotatedBatches, Annotator
from megatron_vpmoe.sources.interface import Batches, Gives, Position, Source, Step, check_needs
from megatron_vpmoe.sources.reference import Reference
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
    "Source",
    "Step",
    "StoredSource",
    "ValidSource",
    "ahead",
    "check_needs",
    "open_source",
]


def open_source(parts: Sequence[Part], cfg: RunConfig, dp_rank: int, dp_size: int) -> Source:
    """The training source of a run; see ``StoredSource``."""
    return ahead(StoredSource(parts, cfg, dp_rank, dp_size))
