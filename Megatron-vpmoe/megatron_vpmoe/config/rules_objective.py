"""Rules of what is minimised: what one objective does not read is not asked of it."""

from __future__ import annotations

from megatron_vpmoe.config.rule import Rule, View, refuse
from megatron_vpmoe.config.schema_objective import ObjectiveFields

_OF_DPO = [name for name in ObjectiveFields.model_fields if name.startswith("dpo_")]


def _is_cross_entropy(c: View) -> bool:
    return c.objective in ("span_ce", "token_ce")


REFUSED: tuple[Rule, ...] = (
    refuse(
        "reference_weights objective",
        "cross-entropy is held against no other model, which would be computed for nothing; set it to null",
        lambda c: _is_cross_entropy(c) and c.reference_weights is not None,
    ),
    refuse(
        "reference_bf16 reference_weights",
        "there is no second model to keep in bfloat16; name its weights",
        lambda c: c.reference_bf16 and c.reference_weights is None,
    ),
    *(
        refuse(
            f"{name} objective",
            "cross-entropy does not read it; leave it out, or ask for dpo",
            lambda c, name=name: _is_cross_entropy(c) and c[name] != ObjectiveFields.model_fields[name].default,
        )
        for name in _OF_DPO
    ),
)
