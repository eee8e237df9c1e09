"""Steps counted on GPUs that are not there: each once, in a process of its own, whoever asks."""

from __future__ import annotations

import functools
from pathlib import Path

from megatron_vpmoe.config import load_config
from megatron_vpmoe.planning.counts import Counts
from megatron_vpmoe.planning.paper_step import Place, counted_step

ROOT = Path(__file__).resolve().parent.parent
NODE = 8
SHORT = ("--num-layers", "8")
"""Two periods of the full stack's schedule: a dense layer, local ones with experts, two global ones."""


@functools.cache
def counted(config: str, *overrides: str, world: int = NODE, rank: int = 0, steps: int = 2) -> Counts:
    """A step of ``configs/<config>`` of one micro-batch a rank."""
    path, cfg = ROOT / "configs" / config, load_config(ROOT / "configs" / config, [*overrides])
    replicas = world // (cfg.parallel.tensor_model_parallel_size * cfg.parallel.pipeline_model_parallel_size)
    rows = str(cfg.training.micro_batch_size * replicas)
    return counted_step(path, [*overrides, "--global-batch-size", rows], Place(world, rank, steps))
