"""The one list of rules: what fields demand of each other, and which are idle where.

All checks of a configuration, what ``vpmoe model combinations`` prints and the tables of docs/architecture.md are made
from it. What the type of a single field can say is the schema's.
"""

from __future__ import annotations

from collections.abc import Sequence

from megatron_vpmoe.config import (
    rules_evaluation,
    rules_failure,
    rules_model,
    rules_objective,
    rules_parallel,
    rules_rollouts,
    rules_run,
)
from megatron_vpmoe.config.rule import Problem, Rule, View
from megatron_vpmoe.config.schema import RunConfig

ARCHITECTURE = rules_model.REFUSED
"""Refused whatever runs the model."""
OF_MODEL = (*ARCHITECTURE, *rules_parallel.REFUSED)
"""Refused of a model that the processes of a run hold, whatever is done with it."""
RUN = (
    *rules_run.REFUSED,
    *rules_objective.REFUSED,
    *rules_rollouts.REFUSED,
    *rules_evaluation.REFUSED,
    *rules_failure.REFUSED,
    *rules_parallel.REFUSED,
    *rules_parallel.OF_WORLD,
)
"""Refused of a run."""
IDLE = rules_model.IDLE
"""Fields of the architecture that change nothing."""
RULES: tuple[Rule, ...] = (*ARCHITECTURE, *RUN, *IDLE)


def find_problems(
    cfg: RunConfig, world_size: int | None = None, *, rules: Sequence[Rule] | None = None
) -> list[Problem]:
    """Every broken rule of ``cfg``.

    Args:
        cfg: a configuration whose single fields are valid.
        world_size: processes over all nodes; None leaves out the rules that depend on it.
        rules: to look at, instead of all.
    """
    view = View(cfg, world_size)
    return [
        problem
        for rule in (RULES if rules is None else rules)
        if rule.kind == "refused"
        for problem in rule.problems(view)
    ]


def _idle(cfg: RunConfig) -> list[Rule]:
    view = View(cfg)
    return [rule for rule in IDLE if rule.when(view)]


def idle_fields(cfg: RunConfig) -> dict[str, str]:
    """Field -> why it changes nothing in ``cfg``."""
    return {name: rule.text for rule in _idle(cfg) for name in rule.names}


def idle_lines(cfg: RunConfig) -> list[str]:
    """One line for each reason: the fields that change nothing in ``cfg``, and why."""
    return [f"{_named(rule)}: {rule.text}".replace("`", "") for rule in _idle(cfg)]


def _named(rule: Rule) -> str:
    if rule.names == rules_model.OF_EXPERTS:
        return "all of `moe`, and the thresholds and optimizer settings of experts"
    return ", ".join(f"`{name}`" for name in rule.names)


def table(rules: Sequence[Rule]) -> str:
    """Rules of one kind as a Markdown table."""
    head = "| idle | where |" if rules[0].kind == "idle" else "| fields | refused because |"
    return "\n".join([head, "|---|---|", *(f"| {_named(rule)} | {rule.general_text()} |" for rule in rules)])
