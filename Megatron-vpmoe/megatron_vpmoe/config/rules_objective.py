"""Rules of what is minimised: what one objective does not read is not asked of it."""

from __future__ import annotations

from megatron_vpmoe.config.rule import Rule, View, refuse
from megatron_vpmoe.config.schema_objective import OBJECTIVES, OWNED, ObjectiveFields

_DEFAULT = {name: field.default for name, field in ObjectiveFields.model_fields.items()}


def _asks_for_ids(c: View) -> bool:
    if c.objective == "on_policy":
        return c.opd_loss == "topk"
    return c.objective == "topk_kd" or c.teacher_weights is not None


REFUSED: tuple[Rule, ...] = (
    refuse(
        "reference_weights objective",
        "{objective} is held against no reference, which would be computed for nothing; set it to null",
        lambda c: c.objective in ("span_ce", "token_ce", "topk_kd", "on_policy") and c.reference_weights is not None,
    ),
    refuse(
        "reference_bf16 reference_weights teacher_weights",
        "there is no second model to keep in bfloat16; name its weights",
        lambda c: c.reference_bf16 and c.reference_weights is c.teacher_weights is None,
    ),
    refuse(
        "kd_teacher teacher_weights",
        "it says whose records a dataset has to hold, and a live teacher makes them; leave one of the two out",
        lambda c: c.kd_teacher is not None and c.teacher_weights is not None,
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
        "objective teacher_weights",
        "on_policy has a teacher score what the student samples; name its weights",
        lambda c: c.objective == "on_policy" and c.teacher_weights is None,
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
