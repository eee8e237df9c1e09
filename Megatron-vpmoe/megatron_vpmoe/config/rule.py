"""What one entry of the list of rules is, and what its condition sees of a configuration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

from megatron_vpmoe.config.schema import RunConfig, fields

Found = bool | int | str | None | Sequence[Mapping[str, object]]
"""Whether a rule applies; or once for each of these mappings, whose values its text takes."""


class Problem(NamedTuple):
    """A broken rule: the fields that take part, and what is wrong with the remedy in one sentence."""

    names: tuple[str, ...]
    text: str


class View:
    """A configuration by the names of its fields, which are unique over all sections, and what follows from them.

    Args:
        cfg: the configuration; its own properties and methods can be asked for here as well.
        world: processes over all nodes; None where that is not known.
    """

    def __init__(self, cfg: RunConfig, world: int | None = None) -> None:
        self.cfg, self.world = cfg, world

    def __getattr__(self, name: str) -> Any:
        for section in self.cfg.__dict__.values():
            if name in section.__dict__:
                return section.__dict__[name]
        return getattr(self.cfg, name)

    def __getitem__(self, name: str) -> Any:
        return getattr(self, name)

    @cached_property
    def sparse(self) -> list[bool]:
        """Of each layer whether it has experts."""
        return [self.cfg.is_moe_layer(n) for n in range(1, self.num_layers + 1)]

    @cached_property
    def layer_types(self) -> set[str]:
        """The kinds of layers, of a mixture those of its experts."""
        mixed = self.layer_type == "mixture"
        return {expert.layer_type for expert in self.mixture_experts or ()} if mixed else {self.layer_type}

    @cached_property
    def has_global(self) -> bool:
        """Whether any layer has no window."""
        return self.window_size is None or self.num_layers >= self.window_attn_skip_freq

    @cached_property
    def has_local(self) -> bool:
        """Whether any layer has one."""
        return self.window_size is not None and self.window_attn_skip_freq > 1

    @cached_property
    def positions(self) -> set[str]:
        """The kinds of positions that layers have."""
        local = {self.local_position_embedding} if self.has_local else set()
        return local | ({self.global_position_embedding} if self.has_global else set())

    @cached_property
    def rotates(self) -> bool:
        """Whether any layer rotates queries and keys."""
        return bool(self.positions & {"grape_m", "rope"})

    @cached_property
    def grouped(self) -> bool:
        """Whether routing is limited to groups of experts."""
        return None not in (self.num_experts, self.moe_router_num_groups, self.moe_router_group_topk)


@dataclass(frozen=True)
class Rule:
    """What fields demand of each other ("refused"), or which of them change nothing ("idle")."""

    names: tuple[str, ...]
    """refused: the fields that decide, so that setting these alone can mend it; idle: those that change nothing."""
    text: str
    """refused: the reason and the remedy; idle: where. ``{name}`` is of the view or of what ``when`` gives,
    ``{maybe_name}`` may be empty."""
    when: Callable[[View], Found]
    kind: Literal["refused", "idle"] = "refused"

    def problems(self, view: View) -> list[Problem]:
        """What is wrong by this rule."""
        found = self.when(view)
        facts = found if isinstance(found, Sequence) and not isinstance(found, str) else [{}] if found else []
        return [Problem(self.names, self.text.format_map(_Values(view, each))) for each in facts]

    def general_text(self) -> str:
        """``text`` with names in place of values."""
        return self.text.format_map(_Names())


def refuse(names: str, text: str, when: Callable[[View], Found]) -> Rule:
    """A rule that refuses; names apart by spaces."""
    return Rule(tuple(names.split()), text, when)


def idle(names: str, text: str, when: Callable[[View], Found]) -> Rule:
    """A rule by which fields change nothing; names apart by spaces."""
    return Rule(tuple(names.split()), text, when, "idle")


def twice(key: str, parts: Sequence[Any] | None) -> list[Mapping[str, object]]:
    """For each label that several of ``parts`` have, the label under ``key``."""
    return [{key: label} for label, count in Counter(part.label for part in parts or ()).items() if count > 1]


class _Values(dict[str, Any]):
    def __init__(self, view: View, facts: Mapping[str, object]) -> None:
        super().__init__(facts)
        self._view = view

    def __missing__(self, name: str) -> Any:
        return self._view[name]


class _Names(dict[str, "_Name"]):
    def __missing__(self, name: str) -> _Name:
        if name.startswith("maybe_"):
            return _Name()
        return _Name(f"`{name}`" if name in fields() else f"*{name.replace('_', ' ')}*")


class _Name(str):
    """A name where a value may be asked for in some format."""

    __slots__ = ()

    def __format__(self, spec: str) -> str:
        return str(self)
