"""A sharded state dict in torch's distributed files, without a checkpoint around them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training.checkpoint_part import Part


def write_part(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` into an empty folder, each rank its own part; a collective."""
    part = Part(folder, state, {})
    written = distributed.gathered(distributed.on_every_rank(part.write))
    distributed.from_rank_0(lambda: part.finish(written))
