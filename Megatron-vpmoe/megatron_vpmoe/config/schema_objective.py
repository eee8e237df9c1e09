"""The fields of the section training that say what is minimised."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from megatron_vpmoe.config.schema_section import BOUND, Amount, PositiveFloat, Section, Text, within

OBJECTIVES = ("span_ce", "token_ce", "dpo", "grpo")


def _is_objective(value: str) -> str:
    if value not in OBJECTIVES and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise PydanticCustomError(BOUND, "must be {names} or module:Class", {"names": ", ".join(OBJECTIVES)})
    return value


class ObjectiveFields(Section):
    """The objective, its settings and the frozen model that it is held against."""

    objective: Annotated[Text, AfterValidator(_is_objective)] = "span_ce"
    """"span_ce": cross-entropy normalised per span; "token_ce": its mean over all supervised tokens (plain text);
    "dpo": preference pairs against reference_log_p; "grpo": sampled answers by their rewards (section rollouts);
    "module:Class": a class of your own that inherits from megatron_vpmoe.objectives.Objective."""
    reference_weights: Text | None = None
    """Checkpoint (or run) of a frozen second model of the same geometry and vocabulary; batches are annotated with its
    log-probabilities of the labels, reference_log_p, before each update. null: none."""
    reference_bf16: bool = False
    """Keep that model in bfloat16 where the run is in fp32."""
    kd_span_weight_reasoning: Amount = 1.0
    """Weight of the mean loss over the reasoning span."""
    kd_span_weight_final: Amount = 1.0
    """Weight of the mean loss over the final-answer span."""
    dpo_beta: Annotated[float, within(1e-6, 100, "the first token would decide every pair")] = 0.1
    """Of dpo: what log-ratios to the reference are multiplied by; the larger, the nearer the model stays to it."""
    dpo_label_smoothing: Annotated[float, within(0, 0.49, "at a half neither answer is preferred")] = 0.0
    """Of dpo: the share of pairs that is taken to be labelled the wrong way round."""
    dpo_loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """Of dpo: "sigmoid", or "ipo": the square of the margin's distance from 1 / (2 dpo_beta)."""
    dpo_length_normalised: bool = False
    """Of dpo: log-ratios are means over an answer's tokens, not sums."""
    grpo_advantage: Literal["std", "mean"] = "std"
    """Of grpo: reward less the group's mean, divided by its standard deviation ("std") or not ("mean", Dr. GRPO)."""
    grpo_normalisation: Literal["token", "sequence", "constant"] = "token"
    """Of grpo: mean over all tokens (DAPO), over each answer's first ("sequence"), or over answers times the longest
    allowed ("constant", Dr. GRPO)."""
    grpo_ratio: Literal["token", "sequence"] = "token"
    """Of grpo: ratio to the weights that sampled, of each token or of the whole answer (GSPO)."""
    grpo_surrogate: Literal["clip", "cispo"] = "clip"
    """Of grpo: "clip": the clipped ratio times the advantage; "cispo": log p, weighed by a ratio without gradient."""
    grpo_clip_low: Annotated[float, within(0, 1, "a ratio is not negative")] = 0.2
    """Of grpo: how far below 1 a ratio counts."""
    grpo_clip_high: Amount = 0.28
    """Of grpo: how far above 1 a ratio counts."""
    grpo_kl: Amount = 0.0
    """Of grpo: weight of the divergence (k3) from reference_weights; 0: none."""
    grpo_mismatch_clamp: PositiveFloat | None = 2.0
    """Of grpo: largest importance weight between trainer and sampler (TIS); null: the mismatch is not corrected."""
