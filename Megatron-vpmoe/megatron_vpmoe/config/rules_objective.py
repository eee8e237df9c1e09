"""Rules of what is minimised: what one objective does not read is not asked of it."""

from __future__ import annotations

from megatron_vpmoe.config.rule import Rule, View, refuse
from megatron_vpmoe.config.schema_objective import OBJECTIVES, ObjectiveFields

_OWNED = [(name, name.split("_")[0]) for name in ObjectiveFields.model_fields if name.startswith(("dpo_", "grpo_"))]
_DEFAULT = {name: field.default for name, field in ObjectiveFields.model_fields.items()}


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
            f"{{objective}} does not read it; leave it out, or ask for {owner}",
            lambda c, name=name, owner=owner: (
                c.objective in OBJECTIVES and c.objective != owner and c[name] != _DEFAULT[name]
            ),
        )
        for name, owner in _OWNED
    ),
)
