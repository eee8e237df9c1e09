"""The fields of the section training that say what is minimised."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from megatron_vpmoe.config.schema_section import BOUND, Amount, Section, Text, within

OBJECTIVES = ("span_ce", "token_ce", "dpo")


def _is_objective(value: str) -> str:
    if value not in OBJECTIVES and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise PydanticCustomError(BOUND, "must be {names} or module:Class", {"names": ", ".join(OBJECTIVES)})
    return value


class ObjectiveFields(Section):
    """The objective, its settings and the frozen model that it is held against."""

    objective: Annotated[Text, AfterValidator(_is_objective)] = "span_ce"
    """"span_ce": cross-entropy normalised per span; "token_ce": its mean over all supervised tokens (plain text);
    "dpo": preference pairs against reference_log_p;
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
