"""What one entry of the list of rules is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from megatron_vpmoe.config.schema import RunConfig, fields

Facts = Mapping[str, object]
"""What a text says besides the values of fields."""
Found = bool | Sequence[Facts]
"""Whether a rule applies; or once for each of these, whose values its text takes."""


class Problem(NamedTuple):
    """A broken rule: the fields that take part, and what is wrong with the remedy in one sentence."""

    names: tuple[str, ...]
    text: str


@dataclass(frozen=True)
class Rule:
    """What fields demand of each other ("refused"), or which of them change nothing ("idle")."""

    names: tuple[str, ...]
    """refused: the fields that decide, so that setting these alone can mend it; idle: those that change nothing."""
    text: str
    """refused: the reason and the remedy; idle: where. ``{field}`` stands for a field's value, ``{fact}`` for one that
    ``when`` gives, ``{maybe_fact}`` for one that may be empty."""
    when: Callable[..., Found]
    """Takes the configuration, and where ``of_world`` the number of processes over all nodes."""
    kind: Literal["refused", "idle"] = "refused"
    of_world: bool = False

    def problems(self, cfg: RunConfig, world_size: int | None = None) -> list[Problem]:
        """What is wrong with ``cfg`` by this rule."""
        found = self.when(cfg, world_size) if self.of_world else self.when(cfg)
        if not found:
            return []
        values = {name: getattr(getattr(cfg, spec.section), name) for name, spec in fields().items()}
        facts: Sequence[Facts] = [{}] if found is True else found
        return [Problem(self.names, self.text.format_map({**values, **each})) for each in facts]

    def applies(self, cfg: RunConfig) -> bool:
        """Whether anything is found in ``cfg``."""
        return bool(self.when(cfg))

    def general_text(self) -> str:
        """``text`` with the names of fields and facts in place of values."""
        return self.text.format_map(_Names())


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


def getter(cfg: RunConfig, name: str) -> Any:
    """The value of a field, by its name alone."""
    return getattr(getattr(cfg, fields()[name].section), name)
