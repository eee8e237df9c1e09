"""``RunConfig``: the typed form of one run's YAML, and what can be derived from it without any other package."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from pydantic import model_validator
from pydantic.fields import FieldInfo

from megatron_vpmoe.config.schema_evaluation import EvaluationSection
from megatron_vpmoe.config.schema_failure import FailureSection
from megatron_vpmoe.config.schema_model import MixtureExpert, ModelSection, MoeSection
from megatron_vpmoe.config.schema_rollouts import RolloutsSection
from megatron_vpmoe.config.schema_run import (
    CheckpointSection,
    DataSection,
    LoggingSection,
    OptimSection,
    ParallelSection,
    TrainingSection,
)
from megatron_vpmoe.config.schema_section import Section


class Retired(NamedTuple):
    """A field that is gone: its section, the one value that any run had (``...``: no matter which), and why."""

    section: str
    value: Any
    reason: str


RETIRED = {
    "normalization": Retired("model", "RMSNorm", "every norm is an RMSNorm"),
    "moe_permute_fusion": Retired("moe", False, "Transformer Engine's kernels are not used"),
    "moe_router_fusion": Retired("moe", False, "Transformer Engine's router cannot be told what it chose before"),
    "moe_shared_expert_overlap": Retired("moe", False, "upstream's kernels for it refuse the biases of this design"),
    "normuon_tensor_parallel": Retired("optim", "whole", "matrices that ranks hold in parts are orthogonalised whole"),
    "virtual_pipeline_model_parallel_size": Retired(
        "parallel", None, "the interleaved schedule sends tensors of one shape, without room for layer 1's values"
    ),
    "context_parallel_size": Retired(
        "parallel", 1, "no attention backend fetches the keys of other ranks; tensor_model_parallel_size with "
        "sequence_parallel shares a sequence"
    ),
    "router_drop_rate_warn_pct": Retired("logging", ..., "no routed row is ever dropped"),
    "router_drop_rate_fail_pct": Retired("logging", ..., "no routed row is ever dropped"),
}  # fmt: skip
"""Configurations of runs and checkpoints from before keep their meaning: a field with its one value is passed over."""


class Renamed(NamedTuple):
    """A field that is called otherwise now: its section, its name, and the value that stands for each of then."""

    section: str
    name: str
    values: dict[Any, Any]


RENAMED = {"first_layer_dense": Renamed("moe", "first_dense_layers", {False: 0, True: 1})}
"""Likewise: read under the new name, from configurations, checkpoints and exports."""


def is_passed_over(section: str, name: str, value: Any) -> bool:
    """Whether a key that no section has is a retired field with the value that every run had."""
    retired = RETIRED.get(name)
    return retired is not None and retired.section == section and retired.value in (value, ...)


def named_today(section: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A section's values without what is passed over, and with the names of today; a new name wins over an old one."""
    renamed = {
        new.name: next((now for then, now in new.values.items() if then == values[old]), values[old])
        for old, new in RENAMED.items()
        if old in values and new.section == section
    }
    kept = {name: value for name, value in values.items() if not is_passed_over(section, name, value)}
    return renamed | {name: value for name, value in kept.items() if name not in RENAMED}


class RunConfig(Section):
    """Everything that decides a run. Field names are unique over all sections and are Megatron's where it has one."""

    model: ModelSection
    """Geometry, positions and attention."""
    moe: MoeSection
    """Experts and router."""
    optim: OptimSection
    """Optimizers and schedule."""
    parallel: ParallelSection
    """Processes."""
    data: DataSection
    """Dataset and order."""
    training: TrainingSection
    """Length, batch, precision, objective."""
    rollouts: RolloutsSection = RolloutsSection()
    """Answers of the model itself, and their rewards."""
    evaluation: EvaluationSection
    """Validation, samples and suites."""
    checkpoint: CheckpointSection
    """Saving and resuming."""
    logging: LoggingSection
    """Metrics and thresholds."""
    failure: FailureSection = FailureSection()
    """Hangs, spikes and early ends."""

    @model_validator(mode="before")
    @classmethod
    def _without_retired(cls, sections: Any) -> Any:
        if not isinstance(sections, dict):
            return sections
        return {
            section: named_today(section, values) if isinstance(values, dict) else values
            for section, values in sections.items()
        }

    @property
    def run_directory(self) -> Path:
        """Directory of everything the run writes."""
        return Path(self.training.run_dir or f"runs/{self.training.run_name}")

    @property
    def samples(self) -> bool:
        """Whether it is trained on sampled answers of its own."""
        return self.rollouts.rewards is not None or self.training.objective == "on_policy"

    @property
    def group_sizes(self) -> list[int]:
        """Answers to each prompt: one number, or those of a curriculum."""
        parts = self.rollouts.curriculum
        return [self.rollouts.rollout_group_size] if parts is None else [part.rollouts for part in parts]

    @property
    def aux_lr(self) -> float:
        """Peak learning rate of the parameters that AdamW keeps, after its default."""
        return self.optim.lr if self.optim.normuon_aux_lr is None else self.optim.normuon_aux_lr

    @property
    def embedding_lr(self) -> float:
        """Peak learning rate of embedding and output layer, after its default."""
        return self.aux_lr if self.optim.decoupled_lr is None else self.optim.decoupled_lr

    @property
    def router_lr(self) -> float:
        """Peak learning rate of the routers' weights, after its default."""
        return self.aux_lr if self.optim.router_lr is None else self.optim.router_lr

    @property
    def decay_iters(self) -> int:
        """Iteration at which the schedule reaches its end, after its default."""
        return self.training.train_iters if self.optim.lr_decay_iters is None else self.optim.lr_decay_iters

    @property
    def stall_timeout(self) -> float:
        """Seconds without a sign of life that end the run, after the default."""
        given = self.failure.stall_timeout_seconds
        return 30.0 * self.parallel.distributed_timeout_minutes if given is None else float(given)

    @property
    def startup_timeout(self) -> float:
        """Seconds without a sign of life that end a run before its first step, or while it reads a checkpoint: as long
        as processes wait for each other."""
        return 60.0 * self.parallel.distributed_timeout_minutes

    def is_global_layer(self, layer_number: int) -> bool:
        """Whether layer ``layer_number`` (from 1) attends without a window; without any window every layer does."""
        return self.model.window_size is None or layer_number % self.model.window_attn_skip_freq == 0

    def is_moe_layer(self, layer_number: int) -> bool:
        """Whether layer ``layer_number`` (from 1) has routed experts."""
        if self.moe.num_experts is None:
            return False
        return layer_number > self.moe.first_dense_layers

    def position_embedding(self, layer_number: int) -> str:
        """How layer ``layer_number`` (from 1) knows positions: grape_m, grape_a, rope or none."""
        is_global = self.is_global_layer(layer_number)
        return self.model.global_position_embedding if is_global else self.model.local_position_embedding

    def is_tpa_layer(self, layer_number: int) -> bool:
        """Whether layer ``layer_number`` (from 1) has tensor-product projections."""
        return self.model.tpa and not self.is_global_layer(layer_number)

    def of_expert(self, expert: MixtureExpert) -> RunConfig:
        """The model that an expert of a mixture is alone."""
        fields = {"layer_type": expert.layer_type, "num_layers": expert.num_layers, "mixture_experts": None}
        return self.model_copy(update={"model": self.model.model_copy(update=fields)})

    def to_yaml(self) -> str:
        """The resolved configuration as YAML; loading it gives an equal configuration."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=120)


class FieldSpec(NamedTuple):
    """Where one field lives: its section, name and declaration."""

    section: str
    name: str
    info: FieldInfo

    @property
    def key(self) -> str:
        """The dotted key, as error messages name it."""
        return f"{self.section}.{self.name}"

    @property
    def flag(self) -> str:
        """The command-line spelling."""
        return "--" + self.name.replace("_", "-")


def section_types() -> dict[str, type[Section]]:
    """Section name -> its class, in the order of ``RunConfig``."""
    return {name: info.annotation for name, info in RunConfig.model_fields.items()}  # pyright: ignore[reportReturnType]


def fields() -> dict[str, FieldSpec]:
    """Field name -> its place, over all sections in order."""
    return {
        name: FieldSpec(section, name, info)
        for section, section_type in section_types().items()
        for name, info in section_type.model_fields.items()
    }


def config_hash(cfg: RunConfig) -> str:
    """sha256 (hex) of the resolved configuration; independent of key order, comments and how values were given."""
    canonical = json.dumps(cfg.model_dump(), sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(canonical.encode()).hexdigest()
