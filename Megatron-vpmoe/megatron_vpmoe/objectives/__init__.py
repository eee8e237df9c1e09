"""What a run minimises: one file an objective, one registry line each; the loop knows none of them.

An objective sees a model output and a batch and returns a loss that is already divided by counts over the whole global
batch. Summing over micro-batches and data-parallel ranks therefore gives the same loss and the same gradients however
the batch is split.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from megatron_vpmoe.annotation import TEACHER_IDS
from megatron_vpmoe.errors import ConfigError, DataError
from megatron_vpmoe.manifest import PREFERENCE, Manifest
from megatron_vpmoe.objectives.denoising import Denoising
from megatron_vpmoe.objectives.dpo import DPO
from megatron_vpmoe.objectives.grpo import GRPO
from megatron_vpmoe.objectives.interface import Needs, Objective, ObjectiveResult
from megatron_vpmoe.objectives.mixture_ce import MixtureCE
from megatron_vpmoe.objectives.on_policy import OnPolicy
from megatron_vpmoe.objectives.span_ce import SpanCE
from megatron_vpmoe.objectives.token_ce import TokenCE
from megatron_vpmoe.objectives.topk_kd import TopKKD
from megatron_vpmoe.runtime.named import imported

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

__all__ = [
    "DPO",
    "GRPO",
    "OBJECTIVES",
    "Denoising",
    "MixtureCE",
    "Needs",
    "Objective",
    "ObjectiveResult",
    "OnPolicy",
    "SpanCE",
    "TokenCE",
    "TopKKD",
    "build_objective",
    "check_kinds",
]

OBJECTIVES: dict[str, type[Objective]] = {
    "span_ce": SpanCE,
    "token_ce": TokenCE,
    "dpo": DPO,
    "grpo": GRPO,
    "topk_kd": TopKKD,
    "on_policy": OnPolicy,
    "denoising": Denoising,
    "mixture_ce": MixtureCE,
}


def check_kinds(objective: Objective, cfg: RunConfig, manifests: Sequence[Manifest]) -> None:
    """Refuse datasets of the kind that the objective does not read: pairs to prefer from, or everything else; and
    records of another teacher than ``training.kd_teacher``.

    Raises:
        DataError: names the dataset, its kind or its teacher.
    """
    needed = {one.name for one in objective.needs.annotations}
    asked = cfg.training.kd_teacher if TEACHER_IDS.name in needed else None
    for manifest in manifests:
        if (manifest.kind == PREFERENCE) != objective.needs.pairs:
            wanted = f"reads {PREFERENCE}" if objective.needs.pairs else f"does not read {PREFERENCE}"
            raise DataError(
                f"{cfg.training.objective} {wanted}, and the dataset is of kind {manifest.kind}",
                source=str(manifest.path),
                remedy="name another dataset, or another objective; rejected answers are not to be imitated",
            )
        if asked is not None and manifest.teacher is not None:
            by = {name: str(manifest.teacher_is.get(name, "")) for name in ("run", "name", "model", "weights_sha256")}
            if asked not in by.values() and not (len(asked) >= 8 and by["weights_sha256"].startswith(asked)):
                raise DataError(
                    f"its records are of {', '.join(f'{name} {value}' for name, value in by.items() if value)}",
                    source=f"{manifest.path}, training.kd_teacher = {asked}",
                    remedy="name a dataset that this teacher scored (vpmoe data score), or another kd_teacher",
                )


def build_objective(cfg: RunConfig) -> Objective:
    """The objective that ``training.objective`` names; refused if the model lacks what it needs.

    Raises:
        ConfigError: ``module:Class`` cannot be had or is no objective; or the model lacks something.
    """
    name = cfg.training.objective
    objective = (OBJECTIVES[name] if name in OBJECTIVES else _imported(name)).from_config(cfg)
    if objective.needs.experts and cfg.moe.num_experts is None:
        raise ConfigError(
            f"the objective {name} needs a model with routed experts",
            source="moe.num_experts = null",
            remedy="train a model that has some, or choose another objective (training.objective)",
        )
    return objective


def _imported(name: str) -> type[Objective]:
    found = imported(
        name,
        "objective",
        source="training.objective",
        remedy="name a class as module:Class, in a module that Python finds from here (PYTHONPATH)",
    )
    if not (isinstance(found, type) and issubclass(found, Objective)):
        raise ConfigError(
            f"{name} is no objective: {found!r}",
            source="training.objective",
            remedy="name a class that inherits from megatron_vpmoe.objectives.Objective",
        )
    return found
