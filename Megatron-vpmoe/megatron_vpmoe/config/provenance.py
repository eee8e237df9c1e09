"""Which differences between two configurations forbid continuing a run: those that change model, data or order."""

from __future__ import annotations

from typing import Any, NamedTuple

from pydantic import ValidationError

from megatron_vpmoe.config.rules import idle_fields
from megatron_vpmoe.config.schema import RETIRED, RunConfig, fields, named_today
from megatron_vpmoe.config.schema_objective import OBJECTIVES, OWNED
from megatron_vpmoe.config.settings_file import shown

_ABSENT = "(absent)"
_ROLLOUTS = tuple(name for name, field in fields().items() if field.section == "rollouts")
_WHOLE_SECTIONS = {
    "model": frozenset({"attention_backend"}),
    "moe": frozenset({"moe_token_dispatcher_type"}),
    "rollouts": frozenset({"rollout_prompts", "rollout_valid_prompts"}),
}
"""Section -> its operational fields; all its other fields bind."""

_OF_ACCESS = frozenset({"kd_teacher", "teacher_server", "teacher_tokenizer", "teacher_concurrency", "teacher_timeout"})
"""What of a teacher may change while it stays the same one: how it is held to be that, and where it is served."""

_SINGLE_FIELDS = {
    "optim": frozenset({"optimizer"}),
    "data": frozenset({"seq_length", "packing_window", "data_seed", "blend", "blend_schedule", "skip_rows"}),
    "training": frozenset(
        {
            "global_batch_size",
            "seed",
            "train_only",
            "bf16",
            "objective",
            "reference_weights",
            "kd_span_weight_reasoning",
            "kd_span_weight_final",
            *OWNED,
        }
    )
    - _OF_ACCESS,
}
"""Section -> its binding fields; everything else, and every section not named here, is operational."""


class FieldChange(NamedTuple):
    """A binding field whose value differs; str() reads "model.num_layers: 8 -> 12"."""

    key: str
    old: Any
    new: Any

    def __str__(self) -> str:
        return f"{self.key}: {self.old!r} -> {self.new!r}"


def is_binding(section: str, name: str) -> bool:
    """Whether a run may not be resumed with another value of this field.

    Datasets and prompts are bound by their hashes, not by their paths; learning rates, intervals, paths, logging and
    the number of processes are free.
    """
    if name in RETIRED:
        return False
    if section in _WHOLE_SECTIONS:
        return name not in _WHOLE_SECTIONS[section]
    return name in _SINGLE_FIELDS.get(section, frozenset())


def provenance_diff(old: dict[str, dict[str, Any]], new: dict[str, dict[str, Any]]) -> list[FieldChange]:
    """Binding differences between two resolved configurations (``RunConfig.model_dump()``); empty: resuming is sound.

    A field that only one side has, such as after an update of the software, counts as a difference. A blend is bound by
    its weights; what a checkpoint from before a field was there lacks, counts as its default where
    that is what was done.
    """
    changes = []
    for section in dict.fromkeys([*old, *new]):
        before, after = (named_today(section, each.get(section, {})) for each in (old, new))
        for name in dict.fromkeys([*before, *after]):
            pair = _bound(name, before.get(name, _ABSENT)), _bound(name, after.get(name, _ABSENT))
            if is_binding(section, name) and pair[0] != pair[1]:
                changes.append(FieldChange(f"{section}.{name}", *pair))
    return changes


_UNDECIDING: dict[str, frozenset[str] | None] = {
    "data": frozenset({"data_path", "blend"}),
    "training": frozenset(
        {"run_name", "run_dir", "micro_batch_size", "compile", "deterministic"}
        | {"nonfinite_policy", "nonfinite_max_skips", *_OF_ACCESS}
        | {f"recompute_{name}" for name in ("granularity", "method", "num_layers", "modules")}
    ),
    "optim": frozenset({"normuon_stack_mib"}),
    "parallel": None,
    "evaluation": None,
    "checkpoint": None,
    "logging": None,
    "failure": frozenset({"stall_timeout_seconds", "preemption_file", "time_budget_minutes"}),
}
"""Section -> fields that leave the trained weights as they are but for rounding; None: the whole section."""


def deciding_fields(cfg: RunConfig) -> dict[str, dict[str, Any]]:
    """What of a configuration decides the trained weights, JSON-able: for the key of a step that trains.

    Paths, intervals, logging, the number of processes and the implementation are left out, and so is what has no
    effect beside the other fields; datasets are to be added by their manifests' hashes, initial weights by theirs.
    """
    objective = cfg.training.objective
    of_others = {name for name, owners in OWNED.items() if objective in OBJECTIVES and objective not in owners}
    idle = {*idle_fields(cfg), *of_others}
    decides: dict[str, dict[str, Any]] = {}
    for section, values in cfg.model_dump(mode="json").items():
        free = _UNDECIDING.get(section, _WHOLE_SECTIONS.get(section, frozenset()))
        is_read = {"rollouts": cfg.samples, "failure": cfg.failure.spike_limit > 0}.get(section, True)
        if free is not None and is_read:
            decides[section] = {name: value for name, value in values.items() if name not in {*free, *idle}}
    decides["data"]["blend_weights"] = [part.weight for part in cfg.data.parts]
    return decides


# Of the sections model and moe: what decides how a model is trained, and not what it computes.
_TRAINING_ONLY = frozenset(
    {
        "init_method_std",
        "moe_router_load_balancing_type",
        "moe_aux_loss_coeff",
        "moe_router_bias_update_rate",
        "experts_precision",
    }
)


def geometry_diff(old: RunConfig, new: RunConfig) -> list[FieldChange]:
    """Differences in what two models compute: fields of ``model`` and ``moe`` that are neither operational nor idle."""
    trees = ({name: cfg.model_dump(mode="json")[name] for name in ("model", "moe")} for cfg in (old, new))
    idle = _TRAINING_ONLY | (idle_fields(old).keys() & idle_fields(new).keys())
    return [change for change in provenance_diff(*trees) if change.key.split(".")[1] not in idle]


# Binding fields that checkpoints from before them lack, where the default is what was done then.
_OF_BLEND = ("blend", "blend_schedule", "skip_rows")
_OF_STATE_SPACE = ("layer_type", "ssm_inner_size", "ssm_state_size", "ssm_conv_size", "ssm_step_rank")
_OF_DENOISER = ("diffusion_levels", "ddim_steps")
_OF_MIXTURE = ("mixture_experts", "kv_lora_rank", "qk_pos_emb_head_dim", "memory_entries")
_LATER_FIELDS = (
    *_OF_BLEND,
    *_OF_STATE_SPACE,
    *_OF_DENOISER,
    *_OF_MIXTURE,
    "train_only",
    "reference_weights",
    "experts_precision",
    *OWNED,
    *_ROLLOUTS,
)


def _bound(name: str, value: Any) -> Any:
    """What of a field's value binds: of a blend the weights, since its datasets are bound by their manifests."""
    if name == "blend" and isinstance(value, list):
        return [part.get("weight") if isinstance(part, dict) else part for part in value]
    return fields()[name].info.default if name in _LATER_FIELDS and value == _ABSENT else value


def stored_faults(error: ValidationError) -> list[str]:
    """What is wrong with stored values, a line each: ``model.hidden_size is missing``, ``steps = 0: must be ...``."""
    faults = []
    for detail in error.errors():
        name = ".".join(map(str, detail["loc"]))
        value = "" if detail["type"] == "extra_forbidden" else f" = {shown(detail['input'])}"
        faults.append(f"{name} is missing" if detail["type"] == "missing" else f"{name}{value}: {detail['msg']}")
    return faults
