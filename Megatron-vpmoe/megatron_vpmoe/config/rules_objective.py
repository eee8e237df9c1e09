"""Rules of what is minimised: what one objective does not read is not asked of it."""

from __future__ import annotations

from megatron_vpmoe.config.parameters import EMBEDDING, OF_MIXED_EXPERTS, is_trained, parameter_sizes
from megatron_vpmoe.config.rule import Rule, View, refuse
from megatron_vpmoe.config.schema_objective import OBJECTIVES, OF_SERVER, OWNED, ObjectiveFields

_DEFAULT = {name: field.default for name, field in ObjectiveFields.model_fields.items()}


def _asks_for_ids(c: View) -> bool:
    if c.objective == "on_policy":
        return c.opd_loss == "topk"
    return c.objective == "topk_kd" or _has_live_teacher(c)


def _has_live_teacher(c: View) -> bool:
    return c.teacher_weights is not None or c.teacher_server is not None


def _temperature(c: View) -> str:
    return "rollout_temperature" if c.objective == "on_policy" else "kd_temperature"


def _trains_experts(c: View) -> bool:
    fixed = (name for name in parameter_sizes(c.cfg) if name == EMBEDDING or name.startswith(OF_MIXED_EXPERTS))
    return c.layer_type == "mixture" and any(is_trained(c.cfg, name) for name in fixed)


REFUSED: tuple[Rule, ...] = (
    *(
        refuse(
            f"load_experts {name}",
            f"experts bring all weights along that there are; set {name} to null, or leave the experts out",
            lambda c, name=name: None not in (c.load_experts, c[name]),
        )
        for name in ("load_weights", "load_embedding")
    ),
    refuse(
        "load_experts layer_type",
        "only a mixture has experts of its own runs; set layer_type to mixture, or load_experts to null",
        lambda c: c.load_experts is not None and c.layer_type != "mixture",
    ),
    refuse(
        "load_experts mixture_experts",
        "{runs} runs for {experts} experts; name one of each",
        lambda c: (
            [{"runs": len(c.load_experts), "experts": len(c.mixture_experts)}]
            if c.layer_type == "mixture"
            and None not in (c.load_experts, c.mixture_experts)
            and len(c.load_experts) != len(c.mixture_experts)
            else []
        ),
    ),
    refuse(
        "layer_type train_only",
        "the experts of a mixture and their embedding stay as they are; set train_only to "
        "['decoder.latent_attention.*', 'decoder.router.*', 'decoder.adapters.*']",
        _trains_experts,
    ),
    refuse(
        "store layer_type",
        "only a mixture reads a store; set layer_type to mixture, or store to null",
        lambda c: c.store is not None and c.layer_type != "mixture",
    ),
    refuse(
        "store memory_entries",
        "what is read of a store takes both; give both or set both to null",
        lambda c: c.layer_type == "mixture" and (c.store is None) != (c.memory_entries is None),
    ),
    refuse(
        "objective layer_type",
        "mixture_ce reads a router's weights; set layer_type to mixture, or choose another objective",
        lambda c: c.objective == "mixture_ce" and c.layer_type != "mixture",
    ),
    refuse(
        "load_embedding load_weights",
        "an embedding comes along with weights; leave one of the two out",
        lambda c: None not in (c.load_embedding, c.load_weights),
    ),
    refuse(
        "load_embedding tensor_model_parallel_size pipeline_model_parallel_size",
        "an embedding is not shared out over ranks as it is loaded; set both sizes to 1",
        lambda c: (
            c.load_embedding is not None and max(c.tensor_model_parallel_size, c.pipeline_model_parallel_size) > 1
        ),
    ),
    refuse(
        "layer_type objective",
        "a denoiser has no distribution over tokens; set objective to denoising",
        lambda c: c.layer_type == "denoiser" and c.objective != "denoising",
    ),
    refuse(
        "objective layer_type",
        "denoising trains a denoiser; set layer_type to denoiser, or choose another objective",
        lambda c: c.objective == "denoising" and c.layer_type != "denoiser",
    ),
    refuse(
        "layer_type train_only",
        "what a denoiser estimates are embeddings, which have to stay as they are; set train_only to ['decoder.*']",
        lambda c: c.layer_type == "denoiser" and is_trained(c.cfg, EMBEDDING),
    ),
    *(
        refuse(
            f"layer_type {name}",
            f"a denoiser writes no text; set {name} to null",
            lambda c, name=name: c.layer_type == "denoiser" and c[name] is not None,
        )
        for name in ("sample_interval", "eval_suites")
    ),
    refuse(
        "reference_weights objective",
        "{objective} is held against no reference, which would be computed for nothing; set it to null",
        lambda c: (
            c.objective in ("span_ce", "token_ce", "topk_kd", "on_policy", "denoising")
            and c.reference_weights is not None
        ),
    ),
    refuse(
        "reference_bf16 reference_weights teacher_weights",
        "there is no second model to keep in bfloat16; name its weights",
        lambda c: c.reference_bf16 and c.reference_weights is c.teacher_weights is None,
    ),
    refuse(
        "kd_teacher teacher_weights teacher_server",
        "it says whose records a dataset has to hold, and a live teacher makes them; leave one of the two out",
        lambda c: c.kd_teacher is not None and _has_live_teacher(c),
    ),
    refuse(
        "teacher_weights teacher_server",
        "one teacher in memory and one that is served; leave one of the two out",
        lambda c: c.teacher_weights is not None and c.teacher_server is not None,
    ),
    refuse(
        "teacher_server served_model",
        "which model teaches belongs to the run, wherever it is served; name it",
        lambda c: c.teacher_server is not None and c.served_model is None,
    ),
    *(
        refuse(
            f"teacher_server {name}",
            f"a server says probabilities at temperature 1, not {{{name}:g}}; set it to 1, or take teacher_weights",
            lambda c, name=name: c.teacher_server is not None and name == _temperature(c) and c[name] != 1,
        )
        for name in ("kd_temperature", "rollout_temperature")
    ),
    *(
        refuse(
            f"{name} teacher_server",
            "no teacher is served; leave it out, or name the address",
            lambda c, name=name: c.teacher_server is None and c[name] != _DEFAULT[name],
        )
        for name in OF_SERVER
    ),
    refuse(
        "kd_beta kd_divergence",
        "{kd_divergence} does not read it; leave it out, or ask for jsd",
        lambda c: c.kd_divergence != "jsd" and c.kd_beta != _DEFAULT["kd_beta"],
    ),
    refuse(
        "kd_top_k padded_vocab_size",
        "{kd_top_k} ids a token of a vocabulary of {padded_vocab_size}",
        lambda c: _asks_for_ids(c) and c.kd_top_k > c.padded_vocab_size,
    ),
    refuse(
        "objective teacher_weights teacher_server",
        "on_policy has a teacher score what the student samples; name its weights, or the address of its server",
        lambda c: c.objective == "on_policy" and not _has_live_teacher(c),
    ),
    *(
        refuse(
            f"{name} opd_loss",
            f"{{opd_loss}} does not read it; leave it out, or ask for {loss}",
            lambda c, name=name, loss=loss: (
                c.objective == "on_policy" and c.opd_loss != loss and c[name] != _DEFAULT[name]
            ),
        )
        for name, loss in {"kd_top_k": "topk", "opd_clamp": "sampled"}.items()
    ),
    *(
        refuse(
            f"{name} objective",
            f"{{objective}} does not read it; leave it out, or ask for {' or '.join(owners)}",
            lambda c, name=name, owners=owners: (
                c.objective in OBJECTIVES and c.objective not in owners and c[name] != _DEFAULT[name]
            ),
        )
        for name, owners in OWNED.items()
    ),
)
