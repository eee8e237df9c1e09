"""How large gradients, weights and updates are, by assignment rule: in the steps that ask for it, and in no other."""

# pyright: reportPrivateImportUsage=false

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist

from megatron_vpmoe.optim.assignment import slug
from megatron_vpmoe.optim.sharded_optimizer import ShardedOptimizer
from megatron_vpmoe.runtime import device

_SQUARES = ("gradient", "weight", "update")


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
        self._rules, self._norm_groups = rules, norm_groups
        self._rule_of = {leaf: rule_of[param] for member in members for leaf, param in member.counted().items()}
        self._expert_of = {leaf: member.expert for member in members for leaf in member.counted()}
        self._norms: defaultdict[tuple[bool, str, str], list[torch.Tensor]] = defaultdict(list)

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
            exact = torch.float64 if pairs[0][0].dtype == torch.float64 else torch.float32
            norms = torch._foreach_norm([value for _, value in pairs], 2, dtype=exact)
            for (leaf, _), norm in zip(pairs, norms, strict=True):
                self._norms[self._expert_of[leaf], quantity, self._rule_of[leaf]].append(norm)

    def finish(self) -> dict[str, float]:
        """Metrics by tag (docs/metrics.md), for which the host waits once; a collective, after the update."""
        self._take("weight", list(self._rule_of), [leaf.detach() for leaf in self._rule_of])
        keys = [(quantity, rule) for quantity in (*_SQUARES, "elements") for rule in self._rules]
        total = torch.zeros(len(keys), dtype=torch.float64, device=device.current_device())
        for expert, groups in self._norm_groups.items():
            total += sum_over(groups, self._own(expert, total))
        found = dict(zip(keys, total.tolist(), strict=True))
        values: dict[str, float] = {}
        for rule in self._rules:
            if not (elements := found["elements", rule]):
                continue  # the model has none, or they are frozen
            gradient, weight, update = (math.sqrt(found[quantity, rule]) for quantity in _SQUARES)
            name = slug(rule)
            values |= {f"grad_norm/{name}": gradient, f"param_norm/{name}": weight}
            values[f"update_rms/{name}"] = update / math.sqrt(elements)
            if weight:
                values[f"update_ratio/{name}"] = update / weight
        return values

    def _own(self, expert: bool, like: torch.Tensor) -> torch.Tensor:
        """This rank's part of the sums, in the order of the keys of ``finish``."""
        norms = [self._norms[expert, quantity, rule] for quantity in _SQUARES for rule in self._rules]
        every = [norm for of_key in norms for norm in of_key]
        squares = torch.stack(every).double().square_() if every else like.new_zeros(0)
        elements = Counter[str]()
        for leaf, rule in self._rule_of.items():
            elements[rule] += leaf.numel() * (self._expert_of[leaf] == expert)
        # A number is filled in, not copied to the device: the host would wait for a copy.
        counts = [like.new_full((), elements[rule]) for rule in self._rules]
        return torch.stack([*(part.sum() for part in squares.split([*map(len, norms)])), *counts])


def sum_over(groups: Sequence[dist.ProcessGroup], values: torch.Tensor) -> torch.Tensor:
    """``values``, summed in place over one group after the other; a collective of each."""
    for group in groups:
        if dist.get_world_size(group) > 1:
            dist.all_reduce(values, group=group)
    return values
