"""Rules of sampled answers and what is learned from them."""

from __future__ import annotations

from itertools import pairwise

from megatron_vpmoe.config.rule import Rule, View, refuse, twice
from megatron_vpmoe.config.schema_objective import ObjectiveFields
from megatron_vpmoe.config.schema_rollouts import MODES, RolloutsSection

_CLIP_LOW = ObjectiveFields.model_fields["grpo_clip_low"].default
_DEFAULT = {name: field.default for name, field in RolloutsSection.model_fields.items() if name != "rewards"}


def _is_anchored(c: View) -> bool:
    return c.objective == "on_policy" and c.opd_anchor_share > 0


def _falling(c: View) -> bool:
    starts = [part.from_share for part in c.curriculum]
    return starts[:1] != [0] or any(after <= before for before, after in pairwise(starts))


def _validates(c: View) -> bool:
    return c.eval_interval is not None or c.eval_at_start


REFUSED: tuple[Rule, ...] = (
    refuse(
        "objective rewards",
        "grpo learns from rewards of the model's own answers; name some (rollouts.rewards)",
        lambda c: c.objective == "grpo" and not c.rewards,
    ),
    refuse(
        "objective rewards",
        "{objective} would learn every sampled answer, whatever its reward; ask for grpo, or set rewards to null",
        lambda c: c.objective in ("span_ce", "token_ce", "dpo") and c.rewards is not None,
    ),
    refuse(
        "rewards blend",
        "prompts are of one dataset; name it (data_path), and prompts of several in one file (rollout_prompts)",
        lambda c: c.samples and c.blend is not None and not (_is_anchored(c) and c.rollout_prompts is not None),
    ),
    refuse(
        "rewards skip_rows",
        "prompts come in an order of their own, and none is skipped; leave it out",
        lambda c: c.samples and c.skip_rows is not None and not _is_anchored(c),
    ),
    refuse(
        "rollout_group_size objective",
        "an answer of grpo is held against the others of its group; take two or more",
        lambda c: c.objective == "grpo" and c.rollout_group_size < 2,
    ),
    refuse(
        "curriculum objective",
        "{objective} has none; set it to null, or ask for on_policy",
        lambda c: c.objective != "on_policy" and c.curriculum is not None,
    ),
    refuse(
        "curriculum curriculum_tokens",
        "one without the other; give both, or set both to null",
        lambda c: (c.curriculum is None) != (c.curriculum_tokens is None),
    ),
    refuse(
        "curriculum rollout_prompts",
        "a dataset's prompts are of one mode; name a file that knows others (vpmoe data prompts)",
        lambda c: c.curriculum is not None and c.rollout_prompts is None,
    ),
    refuse(
        "curriculum rollout_group_size",
        "its parts say how many answers a prompt gets; leave rollout_group_size out",
        lambda c: c.curriculum is not None and c.rollout_group_size != _DEFAULT["rollout_group_size"],
    ),
    refuse(
        "curriculum",
        "the first part begins at 0, and each behind the one before; list them rising",
        lambda c: c.curriculum is not None and _falling(c),
    ),
    refuse(
        "curriculum",
        "the modes of the part from {share:g} have shares of {total:g} together; let them be 1",
        lambda c: [
            {"share": part.from_share, "total": total}
            for part in c.curriculum or ()
            if abs((total := sum(getattr(part, mode) for mode in MODES)) - 1) > 1e-6
        ],
    ),
    refuse(
        "rollout_attempts objective",
        "on_policy learns from every answer and draws no others; leave it out",
        lambda c: c.objective == "on_policy" and c.rollout_attempts != _DEFAULT["rollout_attempts"],
    ),
    refuse(
        "grpo_kl reference_weights",
        "a divergence of weight {grpo_kl:g} needs a reference; name one, or set the weight to 0",
        lambda c: c.objective == "grpo" and c.grpo_kl > 0 and c.reference_weights is None,
    ),
    refuse(
        "grpo_clip_low grpo_surrogate",
        "cispo has no lower bound; leave it out",
        lambda c: c.grpo_surrogate == "cispo" and c.grpo_clip_low != _CLIP_LOW,
    ),
    refuse(
        "rollout_max_new_tokens seq_length",
        "answers of {rollout_max_new_tokens} tokens leave no room for a prompt in rows of {seq_length}",
        lambda c: c.samples and c.rollout_max_new_tokens >= c.seq_length,
    ),
    refuse(
        "rollout_prompts rollout_valid_prompts eval_interval eval_at_start",
        "prompts of a file need held-out ones to validate on; name some, or set eval_interval to null",
        lambda c: c.rollout_prompts is not None and c.rollout_valid_prompts is None and _validates(c),
    ),
    refuse(
        "rollout_valid_prompts eval_interval eval_at_start",
        "nothing is asked of held-out prompts; set eval_interval or eval_at_start, or leave them out",
        lambda c: c.rollout_valid_prompts is not None and not _validates(c),
    ),
    refuse("rewards", "names none; null samples nothing", lambda c: c.rewards == []),
    refuse(
        "rewards",
        "two are called {reward} in metrics; give one function another name",
        lambda c: twice("reward", c.rewards),
    ),
    refuse(
        "global_batch_size rollout_groups rollout_group_size curriculum",
        "{rollout_groups} x {size} answers are no whole number of steps of {global_batch_size}",
        lambda c: [
            {"size": size}
            for size in dict.fromkeys(c.group_sizes)
            if c.samples and c.rollout_groups * size % c.global_batch_size
        ],
    ),
    refuse(
        "rollout_staleness global_batch_size rollout_groups rollout_group_size rollout_epochs curriculum",
        "a sampling serves {served} updates, and one that began {rollout_staleness} before its first use would begin "
        "while another is under way; take at most {served}",
        lambda c: [
            {"served": served}
            for served in [c.rollout_groups * min(c.group_sizes, default=0) // c.global_batch_size * c.rollout_epochs]
            if c.samples and c.rollout_staleness > served > 0
        ],
    ),
    refuse(
        "rollout_staleness tensor_model_parallel_size expert_model_parallel_size",
        "a model that is spread over ranks samples by collectives, which beside those of the updates would have no "
        "common order and could wait for each other for ever; set it to 0, or both sizes to 1",
        lambda c: c.rollout_staleness > 0 and max(c.tensor_model_parallel_size, c.expert_model_parallel_size) > 1,
    ),
    refuse(
        "rewards pipeline_model_parallel_size",
        "log-probabilities of sampled answers are not computed over stages; use stored data, or one stage",
        lambda c: c.pipeline_model_parallel_size > 1 and c.samples,
    ),
    refuse(
        "collapse collapse_length collapse_repetition collapse_validity",
        "stops at no bound; set one, or leave it out",
        lambda c: c.collapse == "stop" and c.collapse_length is c.collapse_repetition is c.collapse_validity is None,
    ),
    refuse(
        "collapse_length rollout_max_new_tokens",
        "no answer has more than {rollout_max_new_tokens} tokens; lower it, or set null",
        lambda c: c.collapse_length is not None and c.collapse_length >= c.rollout_max_new_tokens,
    ),
    refuse(
        "router_replay num_experts",
        "no layer has experts whose choice could be replayed; set router_replay to off",
        lambda c: c.router_replay == "replay" and not any(c.sparse),
    ),
    *(
        refuse(
            f"{name} rewards",
            "nothing is sampled; leave it out, or name rewards (rollouts.rewards)",
            lambda c, name=name, default=default: not c.samples and c[name] != default,
        )
        for name, default in _DEFAULT.items()
    ),
)
