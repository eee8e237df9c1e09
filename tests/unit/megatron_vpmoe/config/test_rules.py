"""Each rule between fields refuses what it is for, and names the fields."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.config.rules import find_problems
from megatron_vpmoe.config.schema import fields

SAMPLED = '--router-replay replay --objective grpo --eval-interval null --rewards [{"function":"finished"}]'


TAUGHT = "--objective on_policy --teacher-weights t --rollout-groups 16 --rollout-group-size 2 --global-batch-size 16 "
TAUGHT += "--rollout-epochs 2"
STATE_SPACE = "--layer-type state_space --num-experts null --router-dead-experts-warn null"
TWO = '[{"layer_type":"transformer","num_layers":2},{"layer_type":"denoiser","num_layers":1}]'
TWICE = '[{"layer_type":"transformer","num_layers":2},{"layer_type":"transformer","num_layers":1}]'
SERVED = "--teacher-server http://a:1 --served-model x"


@pytest.mark.parametrize(
    ("flags", "named", "text"),
    [
        ("--num-query-groups 3", "num_query_groups", "cannot be shared out evenly"),
        ("--kv-channels 31", "kv_channels", "odd"),
        ("--window-attn-skip-freq 1", "tpa", "this schedule has none"),
        ("--window-size null", "tpa", "this schedule has none"),
        ("--window-attn-skip-freq 1 --no-tpa", "window_attn_skip_freq", "no local layer to have it"),
        ("--num-layers 1 --first-dense-layers 0", "value_residual", "no later one"),
        (
            "--moe-router-topk 1 --moe-router-group-topk 1 --moe-router-score-function softmax",
            "moe_router_score_function",
            "learn nothing",
        ),
        ("--router-replay replay", "rewards", "nothing is sampled"),
        ('--objective token_ce --rewards [{"function":"finished"}]', "objective", "whatever its reward"),
        (SAMPLED + ' --data-path null --blend [{"path":"a","weight":1}]', "blend", "one dataset"),
        (f"{SAMPLED} --skip-rows [3]", "skip_rows", "none is skipped"),
        (f"{SAMPLED} --num-experts null --router-dead-experts-warn null", "router_replay", "no layer has experts"),
        ("--moe-token-dispatcher-type alltoall", "moe_token_dispatcher_type", "there is one"),
        ("--seq-length 16", "window_size", "never ends"),
        ("--attention-backend banded", "attention_backend", "global layers"),
        (
            "--attention-backend banded --window-attn-skip-freq 9 --local-position-embedding grape_a",
            "local_position_embedding",
            "no bias on distance",
        ),
        (
            "--moe-router-topk 32 --moe-router-num-groups null --moe-router-group-topk null",
            "moe_router_topk",
            "32 of 16",
        ),
        ("--layer-type state_space", "num_experts", "no feed-forward"),
        (f"{STATE_SPACE} --tensor-model-parallel-size 2", "tensor_model_parallel_size", "over ranks"),
        (f"{STATE_SPACE} --pipeline-model-parallel-size 2", "pipeline_model_parallel_size", "over ranks"),
        (f"{STATE_SPACE} --expert-model-parallel-size 2", "expert_model_parallel_size", "no experts to share"),
        (f"{STATE_SPACE} --compile layers", "compile", "set compile to off"),
        (f"{STATE_SPACE} --recompute-granularity selective", "recompute_granularity", "parts of transformer layers"),
        ("--layer-type denoiser", "window_size", "set window_size to null"),
        ("--layer-type denoiser", "activation", "set activation to swiglu"),
        ("--layer-type denoiser", "num_query_groups", "keys of their own"),
        ("--layer-type denoiser", "objective", "set objective to denoising"),
        ("--layer-type denoiser", "train_only", "have to stay as they are"),
        ("--layer-type denoiser --sample-interval 10", "sample_interval", "writes no text"),
        ("--layer-type denoiser --ddim-steps 30 --diffusion-levels 20", "ddim_steps", "30 steps do not fit into 20"),
        ("--layer-type denoiser --tensor-model-parallel-size 2", "tensor_model_parallel_size", "over ranks"),
        ("--objective denoising", "layer_type", "trains a denoiser"),
        ("--objective mixture_ce", "layer_type", "reads a router's weights"),
        ("--layer-type mixture", "mixture_experts", "no experts to mix"),
        (f"--layer-type mixture --mixture-experts {TWICE}", "mixture_experts", "transformer is there several times"),
        (f"--layer-type mixture --mixture-experts {TWO}", "train_only", "stay as they are"),
        (f"--layer-type mixture --mixture-experts {TWO}", "activation", "set activation to swiglu"),
        (f"--layer-type mixture --mixture-experts {TWO} --qk-pos-emb-head-dim 3", "qk_pos_emb_head_dim", "3 is odd"),
        (f"--layer-type mixture --mixture-experts {TWO} --load-experts [a]", "load_experts", "1 runs for 2 experts"),
        (f"--layer-type mixture --mixture-experts {TWO} --memory-entries 2", "store", "takes both"),
        (
            f"--layer-type mixture --mixture-experts {TWO} --recompute-granularity full --recompute-num-layers 2",
            "recompute_num_layers",
            "each expert again as a whole",
        ),
        ("--load-experts [a,b]", "layer_type", "only a mixture has experts"),
        ("--load-experts [a,b] --load-weights c", "load_weights", "bring all weights along"),
        ("--store a", "layer_type", "only a mixture reads a store"),
        ("--load-embedding a --load-weights b", "load_embedding", "comes along with weights"),
        ("--load-embedding a --pipeline-model-parallel-size 2", "load_embedding", "not shared out over ranks"),
        ("--num-experts 18", "num_experts", "4 equal groups"),
        ("--moe-router-group-topk 8 --moe-router-topk 8", "moe_router_group_topk", "8 of 4 groups"),
        ("--moe-router-topk 3", "moe_router_topk", "not a whole number"),
        ("--moe-router-topk 10", "moe_router_topk", "do not hold 10"),
        ("--moe-router-group-topk null", "moe_router_num_groups", "both"),
        ("--moe-router-score-function softmax", "moe_router_enable_expert_bias", "sigmoid"),
        ("--first-dense-layers 9", "first_dense_layers", "first 9 of 8 layers are dense"),
        ("--num-layers 1", "first_dense_layers", "no expert would ever be used"),
        ("--moe-ffn-hidden-size 30", "moe_ffn_hidden_size", "multiples of 8 in bf16 and of 4"),
        ("--router-dead-experts-warn 85", "router_dead_experts_warn", "comes to 84"),
        ("--router-max-load-warn-pct 25", "router_max_load_warn_pct", "comes to 25.0"),
        ("--router-cv-fail-pct 174", "router_cv_fail_pct", "comes to 173.2"),
        ("--router-max-vio-warn 3", "router_max_vio_warn", "comes to 3.0"),
        ("--min-lr 4e-2", "min_lr", "above the peak"),
        ("--lr-warmup-iters 400", "lr_warmup_iters", "leaves nothing"),
        ("--lr-decay-style WSD", "lr_wsd_decay_iters", "needs the length"),
        ("--lr-wsd-decay-iters 10", "lr_wsd_decay_iters", "no effect"),
        ("--lr-decay-style WSD --lr-wsd-decay-iters 390", "lr_wsd_decay_iters", "exceed"),
        ("--nonfinite-policy skip", "nonfinite_max_skips", "0 permitted skips"),
        ("--nonfinite-max-skips 2", "nonfinite_policy", "policy stop"),
        ("--kd-span-weight-reasoning 0 --kd-span-weight-final 0", "kd_span_weight_final", "nothing would be learnt"),
        ("--keep-every 150", "keep_every", "not a multiple of 100"),
        ("--router-dead-experts-fail 1", "router_dead_experts_fail", "fails at 1"),
        ("--tensor-model-parallel-size 2", "sequence_parallel", "every token to the experts"),
        ("--tensor-model-parallel-size 3", "num_attention_heads", "4 cannot be split evenly over 3"),
        ("--tensor-model-parallel-size 4", "num_query_groups", "2 cannot be split evenly over 4"),
        ("--tensor-model-parallel-size 2 --padded-vocab-size 4097", "padded_vocab_size", "4097 cannot be split"),
        ("--tensor-model-parallel-size 2 --ffn-hidden-size 129", "ffn_hidden_size", "129 cannot be split"),
        (
            "--tensor-model-parallel-size 2 --moe-shared-expert-intermediate-size 131",
            "moe_shared_expert_intermediate_size",
            "131 cannot be split",
        ),
        ("--tensor-model-parallel-size 2 --sequence-parallel --seq-length 511", "seq_length", "511 cannot be split"),
        ("--sequence-parallel", "sequence_parallel", "there is one"),
        ("--pipeline-model-parallel-size 3", "num_layers", "8 layers cannot be shared out evenly over 3 stages"),
        ("--pipeline-model-parallel-size 16", "num_layers", "do not fill 16 stages"),
        ("--pipeline-model-parallel-size 2 --reference-weights x", "reference_weights", "not cut into stages"),
        ("--objective token_ce --reference-weights x", "reference_weights", "held against no reference"),
        ("--objective topk_kd --reference-weights x", "reference_weights", "held against no reference"),
        ("--pipeline-model-parallel-size 2 --objective topk_kd --teacher-weights x", "teacher_weights", "store ahead"),
        ("--objective span_ce --teacher-weights x", "teacher_weights", "or ask for topk_kd"),
        ("--objective span_ce --kd-tail drop", "kd_tail", "or ask for topk_kd"),
        ("--objective topk_kd --teacher-weights x --kd-teacher y", "kd_teacher", "leave one of the two out"),
        (f"--objective topk_kd {SERVED} --kd-teacher y", "kd_teacher", "leave one of the two out"),
        (f"--objective topk_kd {SERVED} --teacher-weights x", "teacher_weights", "leave one of the two out"),
        ("--objective topk_kd --teacher-server http://a:1", "served_model", "name it"),
        (f"--objective topk_kd {SERVED} --kd-temperature 2", "kd_temperature", "at temperature 1, not 2"),
        (
            f"--objective on_policy {SERVED} --rollout-temperature 0.7 --eval-interval null",
            "rollout_temperature",
            "at temperature 1, not 0.7",
        ),
        ("--objective topk_kd --teacher-timeout 5", "teacher_timeout", "no teacher is served"),
        (f"--objective topk_kd {SERVED} --reference-bf16", "reference_bf16", "no second model"),
        ("--objective on_policy --eval-interval null", "teacher_server", "or the address of its server"),
        ("--objective topk_kd --kd-beta 0.3", "kd_beta", "or ask for jsd"),
        ("--objective topk_kd --kd-top-k 250000", "kd_top_k", "ids a token of a vocabulary of"),
        ("--objective topk_kd --reference-bf16", "reference_bf16", "no second model"),
        ("--objective dpo --reference-bf16", "reference_bf16", "no second model"),
        ("--dpo-beta 0.2", "dpo_beta", "does not read it"),
        (
            "--pipeline-model-parallel-size 2 --num-layers-in-first-pipeline-stage 8",
            "num_layers_in_first_pipeline_stage",
            "do not fill 2 stages with 8 in the first",
        ),
        (
            "--pipeline-model-parallel-size 2 --num-layers-in-first-pipeline-stage 4 "
            "--num-layers-in-last-pipeline-stage 3",
            "num_layers_in_last_pipeline_stage",
            "4 in the first and 3 in the last",
        ),
        (
            "--pipeline-model-parallel-size 2 --tensor-model-parallel-size 2",
            "tensor_model_parallel_size",
            "together with tensor_model_parallel_size",
        ),
        (
            "--pipeline-model-parallel-size 2 --expert-model-parallel-size 2",
            "expert_model_parallel_size",
            "together with expert_model_parallel_size",
        ),
        ("--num-layers-in-last-pipeline-stage 3", "pipeline_model_parallel_size", "no effect on a single stage"),
        ("--pipeline-model-parallel-size 8", "first_dense_layers", "stage 0 holds no layer with experts"),
        (
            "--pipeline-model-parallel-size 4 --recompute-granularity full --recompute-num-layers 3",
            "recompute_num_layers",
            "the largest stage has 2",
        ),
        ("--expert-model-parallel-size 3", "expert_model_parallel_size", "spread evenly over 3"),
        (
            "--num-experts null --expert-model-parallel-size 2 --router-dead-experts-warn null",
            "num_experts",
            "no experts",
        ),
        ("--global-batch-size 17", "global_batch_size", "whole number of micro-batches"),
        ("--recompute-method block", "recompute_granularity", "unless recompute_granularity is full"),
        ("--recompute-granularity selective --recompute-num-layers 2", "recompute_num_layers", "has no effect"),
        ("--recompute-granularity full --recompute-modules [moe]", "recompute_modules", "is selective"),
        ("--recompute-granularity full --recompute-num-layers 9", "num_layers", "more than the 8 layers"),
        ("--recompute-granularity selective --recompute-modules []", "recompute_modules", "at least one"),
        ("--recompute-granularity selective --recompute-modules [moe,moe]", "recompute_modules", "each part once"),
        (
            "--recompute-granularity selective --recompute-modules [mlp] --first-dense-layers 0",
            "first_dense_layers",
            "every layer has routed experts",
        ),
        (
            "--recompute-granularity selective --recompute-modules [moe] --num-experts null "
            "--router-dead-experts-warn null",
            "num_experts",
            "there is none",
        ),
        (
            "--recompute-granularity selective --recompute-modules [shared_experts] "
            "--moe-shared-expert-intermediate-size null",
            "moe_shared_expert_intermediate_size",
            "no shared expert",
        ),
        (
            "--recompute-granularity selective --recompute-modules [moe,shared_experts]",
            "recompute_modules",
            "leave shared_experts out",
        ),
        (f"{TAUGHT} --rollout-staleness 5", "rollout_staleness", "serves 4 updates"),
        (f"{TAUGHT} --rollout-staleness 4 --expert-model-parallel-size 2", "rollout_staleness", "no common order"),
        (f"{TAUGHT} --rollout-staleness 4 --tensor-model-parallel-size 2", "rollout_staleness", "no common order"),
        ("--rollout-staleness 1", "rollout_staleness", "nothing is sampled"),
        (f"{TAUGHT} --curriculum [] --curriculum-tokens 9 --rollout-prompts p", "curriculum", "begins at 0"),
    ],
)
def test_rule(small: Path, flags: str, named: str, text: str) -> None:
    found = find_problems(_unchecked(small, flags.split()))
    matching = [problem for problem in found if text in problem.text]
    assert len(matching) == 1, found
    assert named in matching[0].names


def test_a_dense_run_is_not_bothered_by_expert_rules(small: Path) -> None:
    flags = ["--num-experts", "null", "--moe-router-topk", "3", "--activation", "swiglu"]
    assert find_problems(_unchecked(small, [*flags, "--router-dead-experts-warn", "null"])) == []


def test_rules_name_fields_that_exist(small: Path) -> None:
    flags = "--tensor-model-parallel-size 2 --num-query-groups 3 --min-lr 1 --keep-every 7 --num-experts 15"
    for problem in find_problems(_unchecked(small, [*flags.split()]), world_size=7):
        assert set(problem.names) <= set(fields())


def _unchecked(path: Path, flags: list[str]) -> RunConfig:
    """The configuration with ``flags``, before any rule between fields."""
    base = load_config(path).model_dump()
    from megatron_vpmoe.config.flags import parse_flags

    mistakes: list[str] = []
    for section, values in parse_flags(flags, mistakes).items():
        base[section] |= {name: given.value for name, given in values.items()}
    assert mistakes == []
    return RunConfig.model_validate(base)
