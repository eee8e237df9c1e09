"""Training steps of a tiny model on tensor-parallel ranks, and whole parameters from the parts that ranks hold."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from tests.gradients import whole_gradients
from tests.tiny import TINY, random_batch, rows_of, tiny_config

STEPS = 3
# A large eps: Adam turns the sign of a rounding error into a full update otherwise, and the runs part.
# No clipping: it scales the gradients of a rank's own share alone, and here they are compared after the step.
OPTIMIZER: dict[str, object] = {"optimizer": "adam", "adam_eps": 1e-3, "clip_grad": 0.0}
DENSE: dict[str, object] = {"num_experts": None}
QWEN3: dict[str, object] = {
    **DENSE,
    "activation": "swiglu",
    "local_position_embedding": "rope",
    "global_position_embedding": "rope",
    "window_size": None,
    "tpa": False,
    "softmax_type": "vanilla",
    "value_residual": False,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "untie_embeddings_and_output_weights": False,
}
MOE: dict[str, object] = {"moe_aux_loss_coeff": 0.1}
GATED: dict[str, object] = {**MOE, "activation": "swiglu", "add_bias_linear": False}


class Layout(NamedTuple):
    """How one model is spread over the processes at hand; what is left is data parallel."""

    tensor: int = 1
    sequence: bool = False
    expert: int = 1


def train_steps(model_fields: dict[str, object], layout: Layout, **changes: object) -> dict[str, Any]:
    """A few steps on fixed global batches; the parts of this rank. Process groups are left behind for the next call."""
    from megatron.core import parallel_state

    from megatron_vpmoe.config.geometry import parameter_count, tensor_parallel_rank
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.optim import build_optimizer, build_scheduler
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training.router import RouterMonitor
    from megatron_vpmoe.training.step import train_step

    cfg = tiny_config(
        **{**OPTIMIZER, **model_fields, **changes},
        tensor_model_parallel_size=layout.tensor,
        sequence_parallel=layout.sequence,
        expert_model_parallel_size=layout.expert,
    )
    distributed.initialize(seed=7, tensor_model_parallel_size=layout.tensor, expert_model_parallel_size=layout.expert)
    data_rank, data_size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    model = build_model(cfg)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    wrapped = wrap_for_training(model, cfg)
    optimizer = build_optimizer([wrapped], cfg)
    scheduler = build_scheduler(optimizer, cfg)
    objective, monitor = build_objective(cfg), RouterMonitor(model, cfg)
    share = TINY["global_batch_size"] // data_size
    rows = cfg.training.micro_batch_size
    records: list[dict[str, float]] = []
    for step in range(STEPS):
        whole = random_batch(TINY["global_batch_size"], TINY["seq_length"], TINY["padded_vocab_size"], seed=step)
        mine = range(data_rank * share, (data_rank + 1) * share, rows)
        monitor.reset()
        result = train_step(wrapped, optimizer, objective, [rows_of(whole, n, n + rows) for n in mine])
        health = monitor.metrics(result.metrics["tokens/real"])
        records.append({**result.metrics, "grad_norm": result.grad_norm, **health})
        scheduler.step(1)
    gradients = whole_gradients(wrapped)
    parallel_state.destroy_model_parallel()
    parameters: list[tuple[str, Any]] = list(model.named_parameters())
    estimated = dict(parameter_count(tensor_parallel_rank(cfg)).parts)
    estimated["routed experts"] //= layout.expert
    return {
        "records": records,
        "held": (sum(parameter.numel() for _, parameter in parameters), sum(estimated.values())),
        "start": start,
        "gradients": gradients,
        "parameters": {name: parameter.detach().clone() for name, parameter in parameters},
        "biases": {name: buffer.clone() for name, buffer in model.named_buffers() if name.endswith("expert_bias")},
    }


def train_all(cases: dict[str, tuple[dict[str, object], Layout]]) -> dict[str, dict[str, Any]]:
    """Several runs, one after the other, in the same processes."""
    from megatron_vpmoe.runtime import distributed

    results = {name: train_steps(fields, layout) for name, (fields, layout) in cases.items()}
    distributed.shutdown()
    return results


def whole(parts: list[dict[str, torch.Tensor]], layout: Layout) -> dict[str, torch.Tensor]:
    """The tensors of the whole model from those of each rank, in the order of ranks.

    What is not split has to be the same, bit for bit, on all ranks that hold it.
    """
    joined = {}
    for name in parts[0]:
        tensors = [part[name] for part in parts]
        if ".experts." in name:
            joined[name] = torch.cat(tensors[: layout.expert])
            copies = [tensor for first in range(layout.expert) for tensor in tensors[first :: layout.expert]]
            assert all(torch.equal(a, copies[n - n % (len(copies) // layout.expert)]) for n, a in enumerate(copies))
            continue
        groups = [tensors[first :: layout.tensor] for first in range(layout.tensor)]
        assert all(torch.equal(a, group[0]) for group in groups for a in group), name
        joined[name] = _join(name, [group[0] for group in groups])
    return joined


def _join(name: str, parts: list[torch.Tensor]) -> torch.Tensor:
    """One tensor from its tensor-parallel parts."""
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        return torch.cat(parts, dim=1)
    if "linear_tpa_a" in name:
        heads, groups = TINY["num_attention_heads"] // len(parts), TINY["num_query_groups"] // len(parts)
        sizes = [heads * 4, groups * 2, groups * 2]  # the ranks of configs/nano/stage1.yaml
        return torch.cat([torch.cat(section) for section in zip(*(p.split(sizes) for p in parts), strict=True)])
    if "linear_fc1.weight" in name and parts[0].shape[0] * len(parts) == 2 * TINY["ffn_hidden_size"]:
        return torch.cat([torch.cat(half) for half in zip(*(p.chunk(2) for p in parts), strict=True)])
    split = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias", "qkv_bias")
    if name.endswith((*split, "linear_fc1.weight", "linear_fc1.bias", "self_attention.sink")):
        return torch.cat(parts)
    assert all(torch.equal(part, parts[0]) for part in parts), f"{name} differs between tensor-parallel ranks"
    return parts[0]
