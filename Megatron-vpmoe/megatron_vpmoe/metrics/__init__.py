"""What a run measured: one stream of records (step, tag, value) into any number of sinks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vpmoe.metrics.expert_loads import FILE_NAME, ExpertLoadFile
from megatron_vpmoe.metrics.jsonl import METRICS, JsonlSink, read_records, records_until
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
    "records_until",
]


def open_sinks(cfg: RunConfig, directory: Path, kept: Sequence[Record] = ()) -> Sequence[Sink]:
    """The sinks that ``cfg`` asks for: ``metrics.jsonl`` in ``directory`` always, W&B unless it is disabled.

    Args:
        directory: of the run.
        kept: of a resumed run, the records that it goes on from.
    """
    sinks: list[Sink] = [JsonlSink(directory / METRICS, kept)]
    if cfg.logging.wandb_mode != "disabled":
        sinks.append(
            WandbSink(
                project=cfg.logging.wandb_project,
                run_name=cfg.training.run_name,
                mode=cfg.logging.wandb_mode,
                directory=directory,
                config=cfg.model_dump(mode="json"),
                history=kept,
            )
        )
    return sinks


def open_loads(cfg: RunConfig, directory: Path, *, resume_step: int = 0) -> Sequence[ExpertLoadFile]:
    """The file in ``directory`` that has the loads of experts; none for a model without any."""
    if cfg.moe.num_experts is None:
        return []
    layers = [number for number in range(1, cfg.model.num_layers + 1) if cfg.is_moe_layer(number)]
    return [ExpertLoadFile(directory / FILE_NAME, layers, cfg.moe.num_experts, resume_step=resume_step)]
