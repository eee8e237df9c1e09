"""What a configuration came to on this machine, for the log."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from megatron_vpmoe.config.parameters import is_trained, parameter_sizes
from megatron_vpmoe.model.attention.self_attention import VPSelfAttention
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.moe.expert_rows import layout_rule
from megatron_vpmoe.model.moe.narrow_rows import narrow_rule
from megatron_vpmoe.model.transformer_config import token_dispatcher
from megatron_vpmoe.runtime import stages
from megatron_vpmoe.runtime.device import current_device
from megatron_vpmoe.think.diffuser import Diffuser
from megatron_vpmoe.think.scan import scan_form
from megatron_vpmoe.think.state_space import StateSpaceLayer

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


def implementation_notes(model: VPModel, cfg: RunConfig) -> list[str]:
    """What "auto" came to: the attention backend of each kind of layer, and the dispatcher of the experts."""
    chosen: dict[str, str] = {}
    for part in model.decoder.modules():
        if isinstance(part, VPSelfAttention):
            kind = "global" if part.window is None else f"local (window {part.window})"
            chosen[kind] = part.backend_name(current_device())
        elif isinstance(part, Diffuser):
            chosen["global"] = part.backend_name(current_device())
    told = stages.gather_stages((model.stage.layers, chosen))
    chosen = {kind: backend for _, of_stage in told for kind, backend in of_stage.items()}
    notes = []
    if chosen:
        notes = ["attention: " + ", ".join(f"{kind} layers on {backend}" for kind, backend in chosen.items())]
    if any(isinstance(part, StateSpaceLayer) for part in model.decoder.modules()):
        notes.append(f"state space: scan {scan_form(current_device().type, torch.float32)}")
    if cfg.moe.num_experts is not None:
        precision, device_type = cfg.moe.experts_precision, current_device().type
        rule = layout_rule(model.config.params_dtype, device_type, compiled=cfg.training.compile == "step")
        if precision is not None:
            rule = narrow_rule(precision, device_type)
        ranks = cfg.parallel.expert_model_parallel_size
        travel = "all on each rank" if ranks == 1 else f"over {ranks} ranks by {token_dispatcher(cfg)}"
        notes.append(f"experts: {travel}; {rule}")
    if cfg.training.train_only is not None:
        sizes = parameter_sizes(cfg)
        trained = sum(size for name, size in sizes.items() if is_trained(cfg, name))
        notes.append(f"train_only: {trained:,} of {sum(sizes.values()):,} parameters")
    if len(told) > 1:
        notes.append("pipeline: layers " + ", ".join(f"{layers[0]}-{layers[-1]}" for layers, _ in told))
    return notes
