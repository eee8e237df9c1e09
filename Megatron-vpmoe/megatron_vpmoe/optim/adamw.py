"""AdamW for everything that is not a hidden matrix: torch's own, in its fused form."""

from __future__ import annotations

from typing import Any

import torch


def build_adamw(param_groups: list[dict[str, Any]], *, betas: tuple[float, float], eps: float) -> torch.optim.AdamW:
    """torch.optim.AdamW, fused (one kernel over all tensors on CUDA, one C++ loop on CPU); ``lr`` is set per group."""
    return torch.optim.AdamW(param_groups, lr=0.0, betas=betas, eps=eps, weight_decay=0.0, fused=True)


def initialize_adamw_state(optimizer: torch.optim.Optimizer) -> None:
    """Create zero state for every parameter that has none, as the first step would."""
    for group in optimizer.param_groups:
        for param in group["params"]:
            state = optimizer.state[param]
            if not state:
                state["step"] = torch.zeros((), dtype=torch.float32, device=param.device)
                state["exp_avg"] = torch.zeros_like(param)
                state["exp_avg_sq"] = torch.zeros_like(param)
