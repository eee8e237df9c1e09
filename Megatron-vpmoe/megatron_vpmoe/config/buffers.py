"""The buckets of gradients and weights that one rank of a configuration has, by arithmetic."""

from __future__ import annotations

import functools
from itertools import pairwise
from typing import Literal, NamedTuple

from megatron_vpmoe.config.parameters import KEPT_FP32, ROUTED, is_trained, parameter_sizes
from megatron_vpmoe.config.schema import RunConfig
from megatron_vpmoe.config.slices import Bucket, Units, is_divided, plan_buckets

BUCKET_BYTES = {"cpu": 16 * 2**20, "cuda": 2**30}  # of fp32 gradients that are reduced in one call, about


class Held(NamedTuple):
    """A bucket.

    Attributes:
        kind: what is in it: hidden matrices with their small neighbours, routed experts, or rows that AdamW updates.
        ranks: that share it.
        weight_bytes: of one of its weights.
        bucket: its layout.
    """

    kind: Literal["matrices", "experts", "rows"]
    ranks: int
    weight_bytes: int
    bucket: Bucket

    @property
    def slice(self) -> int:
        """Elements of the largest slice."""
        return max(high - low for low, high in pairwise(self.bucket.cuts))


def held_buckets(cfg: RunConfig, layers: range, *, world: int | None, on_cpu: bool) -> list[Held]:
    """Of the trained parameters of a pipeline stage, those of experts last.

    Args:
        cfg: of one tensor-parallel rank (``geometry.tensor_parallel_rank``).
        layers: of the stage.
        world: processes of the run; None: those of one machine.
        on_cpu: buckets are small there.
    """
    p = cfg.parallel
    of_stage = (p.nproc_per_node if world is None else world) // p.pipeline_model_parallel_size
    sizes = {name: size for name, size in parameter_sizes(cfg, layers).items() if is_trained(cfg, name)}
    found: list[Held] = []
    sharing = {False: of_stage // p.tensor_model_parallel_size, True: of_stage // p.expert_model_parallel_size}
    target, width = BUCKET_BYTES["cpu" if on_cpu else "cuda"] // 4, 2 if cfg.training.bf16 else 4
    groups: dict[tuple[bool, bool], list[str]] = {}
    for name in sizes:
        groups.setdefault((ROUTED in name, name.endswith(KEPT_FP32)), []).append(name)
    for (experts, kept), names in sorted(groups.items()):
        units, ranks = tuple(_units(cfg, name, sizes[name]) for name in names), max(1, sharing[experts])
        for bucket in _planned(units, ranks, target):
            first, _ = bucket.places[0]
            kind = "experts" if experts else "rows" if is_divided(names[first]) else "matrices"
            found.append(Held(kind, ranks, 4 if kept else width, bucket))
    return found


@functools.cache
def _planned(units: tuple[Units, ...], ranks: int, target: int) -> list[Bucket]:
    return plan_buckets(units, ranks, target)


def _units(cfg: RunConfig, name: str, size: int) -> Units:
    if not is_divided(name):
        return Units(1, (size,))
    if ROUTED in name:
        experts = cfg.moe.num_experts or 1
        return Units(experts // cfg.parallel.expert_model_parallel_size, (size // experts,))
    return Units(size // cfg.model.hidden_size, (cfg.model.hidden_size,))
