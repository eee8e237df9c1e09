"""Rules of sampled answers and what is learned from them."""

from __future__ import annotations

from megatron_vpmoe.config.rule import Rule, refuse
from megatron_vpmoe.config.schema_rollouts import RolloutsSection

_DEFAULT = {name: field.default for name, field in RolloutsSection.model_fields.items() if name != "rewards"}

REFUSED: tuple[Rule, ...] = (
    refuse(
        "objective rewards",
        "grpo learns from rewards of the model's own answers; name some (rollouts.rewards)",
        lambda c: c.objective == "grpo" and not c.rewards,
    ),
    refuse(
        "grpo_kl reference_weights",
        "a divergence of weight {grpo_kl:g} needs a reference; name one, or set the weight to 0",
        lambda c: c.objective == "grpo" and c.grpo_kl > 0 and c.reference_weights is None,
    ),
    refuse(
        "rollout_max_new_tokens seq_length",
        "answers of {rollout_max_new_tokens} tokens leave no room for a prompt in rows of {seq_length}",
        lambda c: c.rewards is not None and c.rollout_max_new_tokens >= c.seq_length,
    ),
    refuse(
        "eval_interval eval_at_start rewards",
        "answers of the model are no validation split; set eval_interval to null and eval_at_start to false",
        lambda c: c.rewards is not None and (c.eval_interval is not None or c.eval_at_start),
    ),
    refuse(
        "rewards pipeline_model_parallel_size",
        "log-probabilities of sampled answers are not computed over stages; use stored data, or one stage",
        lambda c: c.pipeline_model_parallel_size > 1 and c.rewards is not None,
    ),
    *(
        refuse(
            f"{name} rewards",
            "nothing is sampled; leave it out, or name rewards (rollouts.rewards)",
            lambda c, name=name, default=default: c.rewards is None and c[name] != default,
        )
        for name, default in _DEFAULT.items()
    ),
)
