"""What a run measured: one stream of records (step, tag, value) into any number of sinks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vpmoe.metrics.expert_loads import FILE_NAME, ExpertLoadFile
from megatron_vpmoe.metrics.jsonl import METRICS, JsonlSink, read_records
from megatron_vpmoe.metrics.records import MetricStream, Record, Sink
from megatron_vpmoe.metrics.registration import RunStoreSink
from megatron_vpmoe.metrics.wandb import WandbSink

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

__all__ = [
    "METRICS",
    "ExpertLoadFile",
    "JsonlSink",
    "MetricStream",
    "Record",
    "RunStoreSink",
    "Sink",
    "WandbSink",
    "open_loads",
    "open_sinks",
    "read_records",
]


def open_sinks(cfg: RunConfig, directory: Path, *, resume_step: int = 0) -> Sequence[Sink]:
    """The sinks that ``cfg`` asks for: ``metrics.jsonl`` in ``directory`` always, W&B unless it is disabled.

    Args:
        directory: of the run.
        resume_step: last step whose records stay; later ones are of steps that will be done again.
    """
    path = directory / METRICS
    sinks: list[Sink] = [JsonlSink(path, resume_step=resume_step)]
    if cfg.logging.wandb_mode != "disabled":
        sinks.append(
            WandbSink(
                project=cfg.logging.wandb_project,
                run_name=cfg.training.run_name,
                mode=cfg.logging.wandb_mode,
                directory=directory,
                config=cfg.model_dump(mode="json"),
                history=lambda: (record for record in read_records(path) if record.step <= resume_step),
            )
        )
    return sinks


def open_loads(cfg: RunConfig, directory: Path, *, resume_step: int = 0) -> Sequence[ExpertLoadFile]:
    """The file in ``directory`` that has the loads of experts; none for a model without any."""
    if cfg.moe.num_experts is None:
        return []
    layers = [number for number in range(1, cfg.model.num_layers + 1) if cfg.is_moe_layer(number)]
    return [ExpertLoadFile(directory / FILE_NAME, layers, cfg.moe.num_experts, resume_step=resume_step)]
