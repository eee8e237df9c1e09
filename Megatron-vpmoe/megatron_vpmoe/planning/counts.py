"""What was counted of a step, and what is asked of the counts."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field

from megatron_vpmoe.planning.kernels import Cost


@dataclass
class Counts:
    """What was counted.

    Attributes:
        costs: by (pass, part, operation).
        syncs: times that the host waits for the device, by (pass, "file:line").
        collectives: (calls, bytes given by this rank) by (pass, name, ranks).
        layers: kernels of a layer's forward pass by (pass, kind of layer), of one that makes nothing for others.
        peaks: bytes by category when most were held, by pass. What has no category of its own goes by the pass that
            made it.
    """

    costs: dict[tuple[str, str, str], Cost] = field(default_factory=dict)
    syncs: Counter[tuple[str, str]] = field(default_factory=Counter)
    collectives: dict[tuple[str, str, int], tuple[int, int]] = field(default_factory=dict)
    layers: dict[tuple[str, str], int] = field(default_factory=dict)
    peaks: dict[str, dict[str, int]] = field(default_factory=dict)

    def to_json(self) -> str:
        """See ``from_json``."""
        tables = {
            name: [[[key] if isinstance(key, str) else key, value] for key, value in table.items()]
            for name, table in vars(self).items()
        }
        return json.dumps(tables)

    @classmethod
    def from_json(cls, text: str) -> Counts:
        """What ``to_json`` was called on."""
        tables = json.loads(text)
        peaks = {of_pass: held for (of_pass,), held in tables.pop("peaks")}
        read = {name: {tuple(key): value for key, value in table} for name, table in tables.items()}
        return cls(
            costs={key: Cost(*value) for key, value in read["costs"].items()},
            syncs=Counter(read["syncs"]),
            collectives={key: tuple(value) for key, value in read["collectives"].items()},
            layers=read["layers"],
            peaks=peaks,
        )

    @property
    def peak(self) -> int:
        """Most bytes held at one time."""
        return max(sum(held.values()) for held in self.peaks.values())

    def total(self, of_pass: str | None = None, part: str | None = None, name: str | None = None) -> Cost:
        """The sum over all that agree with what is given."""
        asked = (of_pass, part, name)
        chosen = [
            cost
            for key, cost in self.costs.items()
            if all(wanted in (None, is_so) for wanted, is_so in zip(asked, key, strict=True))
        ]
        return Cost(*map(sum, zip(*chosen, strict=True))) if chosen else Cost(0)
