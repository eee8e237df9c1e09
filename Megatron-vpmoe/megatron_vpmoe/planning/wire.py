"""Seconds of collectives between ranks that share nodes in part: inside a node first, then between nodes."""

from __future__ import annotations

from typing import NamedTuple

from megatron_vpmoe.runtime.machines import Machine


class Ranks(NamedTuple):
    """A group.

    Attributes:
        count: of all.
        together: of them on one node.
    """

    count: int
    together: int

    @property
    def nodes(self) -> int:
        """Nodes that it spans."""
        return -(-self.count // self.together)


def all_gather(machine: Machine, size: float, ranks: Ranks) -> float:
    """Until each rank has all ``size`` bytes; a reduce-scatter of as many takes as long.

    Every rank of a node brings the same part from other nodes, and hands it to the others of its node.
    """
    if ranks.count == 1 or not size:
        return 0.0
    inside = size * (ranks.together - 1) / ranks.together / machine.rate("link", size)
    own = size / ranks.together
    return inside + own * (ranks.nodes - 1) / ranks.nodes / machine.rate("network", own)


def all_reduce(machine: Machine, size: float, ranks: Ranks) -> float:
    """A reduce-scatter and an all-gather."""
    return 2 * all_gather(machine, size, ranks)


def all_to_all(machine: Machine, size: float, ranks: Ranks) -> float:
    """Each rank sends ``size`` bytes, equal parts to all."""
    if ranks.count == 1 or not size:
        return 0.0
    inside = size * (ranks.together - 1) / ranks.count / machine.rate("link", size)
    return inside + size * (ranks.count - ranks.together) / ranks.count / machine.rate("network", size)


def hand_over(machine: Machine, size: float, *, same_node: bool) -> float:
    """One rank to one other."""
    return size / machine.rate("link" if same_node else "network", size)
