"""How large gradients, weights and updates are, by assignment rule: in the steps that ask for it, and in no other."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_vpmoe.optim.assignment import slug
from megatron_vpmoe.optim.sharded_optimizer import ShardedOptimizer
from megatron_vpmoe.runtime import device

_QUANTITIES = ("gradient", "weight", "update", "elements")


class GroupSizes:
    """Sums of squares by rule over this rank's pieces, and in the end over all ranks.

    A tensor that tensor-parallel ranks or tied stages share is counted once, as in the gradient's norm.

    Args:
        members: of the optimizer.
        rule_of: the rule of each of its parameters.
        rules: all names, in the same order on every rank.
        norm_groups: for dense parameters (False) and experts (True) the groups over which their pieces lie.
    """

    def __init__(
        self,
        members: Sequence[ShardedOptimizer],
        rule_of: Mapping[torch.nn.Parameter, str],
        rules: Sequence[str],
        norm_groups: Mapping[bool, Sequence[dist.ProcessGroup]],
    ) -> None:
        self._members, self._rules, self._norm_groups = members, rules, norm_groups
        self._rule_of = {leaf: rule_of[param] for member in members for leaf, param in member.counted().items()}
        self._expert_of = {leaf: member.expert for member in members for leaf in member.counted()}
        self._leaves: dict[str, list[torch.Tensor]] = {quantity: [] for quantity in _QUANTITIES}
        self._norms: dict[str, list[torch.Tensor]] = {quantity: [] for quantity in _QUANTITIES}

    def gradients(self) -> None:
        """Of ``prepare_grads``, before they are clipped."""
        grads = {leaf: grad for leaf in self._rule_of if (grad := leaf.grad) is not None}
        self._take("gradient", list(grads), list(grads.values()))

    def moved(self, leaves: Sequence[torch.Tensor], updates: Sequence[torch.Tensor]) -> None:
        """What was added to (a part of) each of ``leaves``; looked at before this returns."""
        self._take("update", leaves, updates)

    def _take(self, quantity: str, leaves: Sequence[torch.Tensor], values: Sequence[torch.Tensor]) -> None:
        pairs = [(leaf, value) for leaf, value in zip(leaves, values, strict=True) if leaf in self._rule_of]
        if pairs:
            self._leaves[quantity] += [leaf for leaf, _ in pairs]
            exact = torch.float64 if pairs[0][0].dtype == torch.float64 else torch.float32
            self._norms[quantity] += torch._foreach_norm([value for _, value in pairs], 2, dtype=exact)

    def finish(self) -> dict[str, float]:
        """Metrics by tag (docs/metrics.md), for which the host waits; a collective of all ranks, after the update."""
        self._take("weight", list(self._rule_of), [leaf.detach() for leaf in self._rule_of])
        sums: dict[bool, Counter[tuple[str, str]]] = {expert: Counter() for expert in self._norm_groups}
        for quantity, norms in self._norms.items():
            numbers = torch.stack(norms).double().square_().tolist() if norms else []
            for leaf, number in zip(self._leaves[quantity], numbers, strict=True):
                sums[self._expert_of[leaf]][quantity, self._rule_of[leaf]] += number
        for leaf, rule in self._rule_of.items():
            sums[self._expert_of[leaf]]["elements", rule] += leaf.numel()
        keys = [(quantity, rule) for quantity in _QUANTITIES for rule in self._rules]
        total = torch.zeros(len(keys), dtype=torch.float64, device=device.current_device())
        for expert, groups in self._norm_groups.items():
            own = torch.tensor([sums[expert][key] for key in keys], dtype=torch.float64).to(total.device)
            total += sum_over(groups, own)
        found = dict(zip(keys, total.tolist(), strict=True))
        values: dict[str, float] = {}
        for rule in self._rules:
            if not (elements := found["elements", rule]):
                continue  # the model has none, or they are frozen
            gradient, weight, update = (math.sqrt(found[quantity, rule]) for quantity in _QUANTITIES[:3])
            name = slug(rule)
            values |= {f"grad_norm/{name}": gradient, f"param_norm/{name}": weight}
            values[f"update_rms/{name}"] = update / math.sqrt(elements)
            if weight:
                values[f"update_ratio/{name}"] = update / weight
        return values


def sum_over(groups: Sequence[dist.ProcessGroup], values: torch.Tensor) -> torch.Tensor:
    """``values``, summed in place over one group after the other; a collective of each."""
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(values, group=group)
    return values
