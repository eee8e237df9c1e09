"""The matrices that NorMuon makes orthogonal, by shape, and what that costs: arithmetic alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Literal

from megatron_vpmoe.config.parameters import is_trained
from megatron_vpmoe.config.schema import RunConfig

Form = Literal["direct", "gram"]


def polar_express_flops(rows: int, cols: int, steps: int = 5, iteration: Form = "direct") -> int:
    """Multiplications and additions of the matrix products for one matrix of ``rows`` x ``cols``."""
    small, large = min(rows, cols), max(rows, cols)
    if iteration == "direct":
        return steps * (4 * small * small * large + 2 * small**3)
    # An iteration has A²; all but the first a product with Q; all but the last two for the next A.
    return 4 * small * small * large + (steps + (steps - 1) + 2 * (steps - 1)) * 2 * small**3


def orthogonal_matrices(cfg: RunConfig, layers: range) -> tuple[Counter[tuple[int, int]], Counter[tuple[int, int]]]:
    """(rows, columns) of whole matrices of these layers -> how many are trained: of all but routed experts, of those.

    Empty where ``optim.optimizer`` is not normuon.
    """
    dense, routed = Counter[tuple[int, int]](), Counter[tuple[int, int]]()
    m, moe = cfg.model, cfg.moe
    # Of a mixture AdamW has all that is trained.
    for number in layers if cfg.optim.optimizer == "normuon" and m.layer_type != "mixture" else ():
        if m.layer_type == "state_space":
            for name, shapes in _state_space(cfg).items():
                if is_trained(cfg, f"decoder.layers.{number - 1}.mixer.{name}.weight"):
                    dense.update(shapes)
            continue
        groups = m.num_query_groups
        if cfg.is_tpa_layer(number):
            of_rank = {"linear_tpa_a": [m.num_attention_heads * m.tpa_q_rank, *2 * [groups * m.tpa_rank]]}
            of_rank["linear_tpa_b"] = [m.tpa_q_rank * m.kv_channels, *2 * [m.tpa_rank * m.kv_channels]]
        else:
            of_rank = {"linear_qkv": [m.num_attention_heads * m.kv_channels, *2 * [groups * m.kv_channels]]}
        found = {f"self_attention.{name}": [(r, m.hidden_size) for r in rows] for name, rows in of_rank.items()}
        found["self_attention.linear_proj"] = [(m.hidden_size, m.num_attention_heads * m.kv_channels)]
        if not cfg.is_moe_layer(number):
            found |= {f"mlp.{name}": shapes for name, shapes in _feed_forward(cfg, m.ffn_hidden_size).items()}
        elif moe.moe_shared_expert_intermediate_size:
            shared = _feed_forward(cfg, moe.moe_shared_expert_intermediate_size)
            found |= {f"mlp.shared_experts.{name}": shapes for name, shapes in shared.items()}
        for name, shapes in found.items():
            if is_trained(cfg, f"decoder.layers.{number - 1}.{name}.weight"):
                dense.update(shapes)
        if cfg.is_moe_layer(number):
            for name, shapes in _feed_forward(cfg, moe.moe_ffn_hidden_size).items():
                stored = name.removeprefix("linear_") + "_weight"
                if is_trained(cfg, f"decoder.layers.{number - 1}.mlp.experts.{stored}"):
                    routed.update((moe.num_experts or 0) * shapes)
    return dense, routed


def _state_space(cfg: RunConfig) -> dict[str, list[tuple[int, int]]]:
    m = cfg.model
    h, inner, states, rank = m.hidden_size, m.ssm_inner_size, m.ssm_state_size, m.ssm_step_rank
    chosen = [(rows, inner) for rows in (rank, states, states)]
    return {"in_proj": 2 * [(inner, h)], "x_proj": chosen, "dt_proj": [(inner, rank)], "out_proj": [(h, inner)]}


def _feed_forward(cfg: RunConfig, width: int) -> dict[str, list[tuple[int, int]]]:
    h = cfg.model.hidden_size
    return {"linear_fc1": (2 if cfg.model.activation == "swiglu" else 1) * [(width, h)], "linear_fc2": [(h, width)]}


def slot_rows(counts: Mapping[tuple[int, int], float], most: float) -> dict[tuple[int, int], int]:
    """How many rows the matrices of each shape (rows, columns) get in a stack: their own, or those of taller ones.

    Rows of zeros change nothing of the others' orthogonalised form, and few stacks are few launches. Beyond a square
    the smaller side would be another one: those keep theirs.

    Args:
        counts: of each shape.
        most: operations of Polar Express that the zeros of one stack may take; 0: no zeros.
    """
    slots = {(rows, cols): rows for rows, cols in counts}
    for cols in {cols for _, cols in counts}:
        together: list[int] = []
        for height in sorted(rows for rows, of_cols in counts if of_cols == cols and rows <= cols):
            taken = (
                counts[r, cols] * (polar_express_flops(height, cols) - polar_express_flops(r, cols)) for r in together
            )
            together = [*together, height] if sum(taken) <= most else [height]
            slots |= {(rows, cols): height for rows in together}
    return slots
