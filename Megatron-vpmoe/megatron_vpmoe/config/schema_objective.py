"""The fields of the section training that say what is minimised."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator
from pydantic_core import PydanticCustomError

from megatron_vpmoe.config.schema_section import BOUND, Amount, Section, Text, within

OBJECTIVES = ("span_ce", "token_ce", "dpo", "grpo", "topk_kd", "on_policy", "denoising", "mixture_ce")


def _is_objective(value: str) -> str:
    if value not in OBJECTIVES and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", value):
        raise PydanticCustomError(BOUND, "must be {names} or module:Class", {"names": ", ".join(OBJECTIVES)})
    return value


def _is_address(value: str) -> str:
    if not re.fullmatch(r"https?://[^\s/]+(/v1)?/?", value):
        raise PydanticCustomError(BOUND, "must be http://host:port")
    return value


class ObjectiveFields(Section):
    """The objective, its settings and the frozen models that it is held against."""

    objective: Annotated[Text, AfterValidator(_is_objective)] = "span_ce"
    """"span_ce": cross-entropy normalised per span; "token_ce": its mean over all supervised tokens (plain text);
    "dpo": preference pairs against reference_log_p; "grpo": sampled answers by their rewards (section rollouts);
    "topk_kd": cross-entropy as span_ce, mixed with the divergence from a teacher's top K, stored, teacher_weights' or
    teacher_server's; "on_policy": sampled answers by how likely they are to either, beside stored conversations;
    "denoising": the squared error of a denoiser's estimate of the next token's embedding;
    "mixture_ce": token_ce of a mixture, less the entropy of its router's weights;
    "module:Class": a class of your own that inherits from megatron_vpmoe.objectives.Objective."""
    reference_weights: Text | None = None
    """Checkpoint (or run) of a frozen second model of the same geometry and vocabulary; batches are annotated with its
    log-probabilities of the labels, reference_log_p, before each update. null: none."""
    reference_bf16: bool = False
    """Keep that model, or teacher_weights', in bfloat16 where the run is in fp32."""
    teacher_weights: Text | None = None
    """Checkpoint (or run) of a frozen teacher of the same vocabulary, of any geometry. Of topk_kd: batches are
    annotated with its kd_top_k likeliest tokens before each update; null: the dataset's store says them. Of on_policy,
    which needs one or a teacher_server: it scores the sampled answers."""
    teacher_server: Annotated[Text, AfterValidator(_is_address)] | None = None
    """Address (http://host:port) of a vLLM or SGLang server of a teacher of the same vocabulary, or of the full one of
    which a compact vocabulary is part; asked as teacher_weights would be, at temperature 1. null: none."""
    served_model: Text | None = None
    """Name by which teacher_server serves the teacher."""
    teacher_tokenizer: Text | None = None
    """Folder of that teacher's tokenizer.json, to compare every id before the run; null: only some ids are probed."""
    teacher_concurrency: Annotated[int, within(1, 4096, "a server queues what it has no room for")] = 16
    """Requests to teacher_server under way, of each data-parallel rank."""
    teacher_timeout: Annotated[float, within(0.1, 3600, "a lost connection would not be noticed")] = 120.0
    """Seconds for an answer of teacher_server; after six attempts, each later than the one before, the run saves and
    ends."""
    kd_teacher: Text | None = None
    """Of topk_kd: whose records the datasets have to hold: a model's name, or the beginning of its weights' sha256, as
    their manifests have them. null: anyone's."""
    kd_alpha: Annotated[float, within(0, 1, "cross-entropy would count negatively")] = 0.5
    """Of topk_kd: weight of the divergence at a position with a record; cross-entropy has the rest of it, and all of a
    position without."""
    kd_divergence: Literal["forward_kl", "reverse_kl", "jsd"] = "forward_kl"
    """Of topk_kd: KL(teacher, student), KL(student, teacher), or what lies between ("jsd", generalised Jensen-Shannon).
    """
    kd_beta: Annotated[float, within(1e-3, 0.999, "it would be reverse_kl")] = 0.5
    """Of topk_kd with jsd: the teacher's share of the mixture; near 0 it is forward_kl, near 1 reverse_kl."""
    kd_temperature: Annotated[float, within(0.05, 100, "all tokens would be as likely")] = 1.0
    """Of topk_kd: that both softmaxes are taken at; the divergence is multiplied by its square. A store serves the one
    that it was made at."""
    kd_tail: Literal["bucket", "drop", "renormalise"] = "bucket"
    """Of topk_kd: what becomes of the probability outside the top K: one more outcome, left out of the sum, or shared
    out among the teacher's top K."""
    kd_top_k: Annotated[int, within(1, 2**18, "no vocabulary has that many")] = 64
    """Of topk_kd and of on_policy's loss "topk": ids a token; of a store with more the likeliest, a store with fewer is
    refused."""
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
    dpo_chosen_weight: Amount = 0.0
    """Of dpo: weight of the chosen answers' cross-entropy a token beside it (RPO), which keeps them likely."""
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
    grpo_mismatch_clamp: Annotated[float, within(1, 1e4, "nothing would be clamped")] | None = 2.0
    """Of grpo: largest importance weight between trainer and sampler (TIS); null: the mismatch is not corrected."""
    opd_loss: Literal["sampled", "topk"] = "sampled"
    """Of on_policy: "sampled": the sampled token's log p of the teacher less that of the student is its advantage;
    "topk": KL(student, teacher) over the teacher's kd_top_k likeliest tokens and their tail, at each sampled token."""
    opd_clamp: Annotated[float, within(1, 1e4, "nothing would be clamped")] | None = 2.0
    """Of on_policy with "sampled": largest importance weight between the student and what it was when it sampled; null:
    it is not clamped."""
    opd_anchor_share: Annotated[float, within(0, 0.95, "hardly an answer would be learnt from")] = 0.15
    """Of on_policy: share of stored conversations, learnt by cross-entropy, among supervised tokens; 0: none."""
    mixture_entropy_coeff: Amount = 0.01
    """Of mixture_ce: weight of the entropy of the router's weights at the first step; it falls evenly to 0 at the last.
    """


_OWNERS = {
    "dpo_": ("dpo",),
    "grpo_": ("grpo",),
    "kd_": ("topk_kd",),
    "opd_": ("on_policy",),
    "mixture_": ("mixture_ce",),
}
_SHARED = ("topk_kd", "on_policy")
OF_SERVER = ("served_model", "teacher_tokenizer", "teacher_concurrency", "teacher_timeout")
"""Fields that say something of ``teacher_server``."""
OWNED = {
    **{
        name: owners
        for name in ObjectiveFields.model_fields
        for prefix, owners in _OWNERS.items()
        if name.startswith(prefix) and not name.startswith("kd_span_")
    },
    **dict.fromkeys(("teacher_weights", "teacher_server", *OF_SERVER, "kd_top_k"), _SHARED),
}
"""Field -> the objectives of ours that read it; kd_span_weight_* are of every loss by span."""
