"""Between the two layouts of routed experts: one stack a weight, one module an expert (Megatron-Core's SequentialMLP).

Shapes: E experts, F expert FFN width, H hidden, A what the first matrix makes (F, or 2 F of a gate over its up
projection). In both layouts a matrix is output by input.

| stacked | sequential, i from 0 to E - 1 |
|---|---|
| ``fc1_weight`` [E, A, H] | ``local_experts.{i}.linear_fc1.weight`` [A, H] |
| ``fc1_bias`` [E, A] | ``local_experts.{i}.linear_fc1.bias`` [A] |
| ``fc2_weight`` [E, H, F] | ``local_experts.{i}.linear_fc2.weight`` [H, F] |
| ``fc2_bias`` [E, H] | ``local_experts.{i}.linear_fc2.bias`` [H] |
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

NAMES = ("fc1_weight", "fc1_bias", "fc2_weight", "fc2_bias")
_SEQUENTIAL = re.compile(r"local_experts\.(\d+)\.linear_(fc[12])\.(weight|bias)")


def stacked_from_sequential(state: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Stack the weights of a SequentialMLP.

    Args:
        state: its state dict, or any mapping with its names (such as gradients); other entries are left out.
        prefix: what stands in front of ``local_experts`` there.

    Returns:
        the state of StackedExperts, without a prefix.

    Raises:
        ValueError: nothing under the prefix, or experts that do not count from 0 on without a gap.
    """
    found: dict[str, dict[int, Tensor]] = {}
    for name, value in state.items():
        match = _SEQUENTIAL.fullmatch(name.removeprefix(prefix)) if name.startswith(prefix) else None
        if match is not None:
            found.setdefault(f"{match[2]}_{match[3]}", {})[int(match[1])] = value
    if not {"fc1_weight", "fc2_weight"} <= found.keys():
        raise ValueError(f"no experts under the prefix {prefix!r}")
    experts = max(len(members) for members in found.values())
    for name, members in found.items():
        if sorted(members) != list(range(experts)):
            raise ValueError(f"experts {sorted(members)} of {name} are not 0 to {experts - 1}")
    return {name: torch.stack([members[expert] for expert in range(experts)]) for name, members in found.items()}


def sequential_from_stacked(state: Mapping[str, Tensor], prefix: str = "") -> dict[str, Tensor]:
    """The reverse: views of the stacks under SequentialMLP's names.

    Args:
        state: of StackedExperts; other entries are left out.
        prefix: what stands in front of ``fc1_weight`` there, and will stand in front of ``local_experts``.
    """
    return {
        f"{prefix}local_experts.{expert}.linear_{name.replace('_', '.')}": matrix
        for name in NAMES
        if f"{prefix}{name}" in state
        for expert, matrix in enumerate(state[f"{prefix}{name}"].unbind())
    }
