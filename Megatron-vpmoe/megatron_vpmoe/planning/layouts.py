"""Every way to spread a run over a fleet that the house's rules admit, each with its memory and predicted step."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple, get_args

from megatron_vpmoe.config.memory import memory_estimate
from megatron_vpmoe.config.rules import find_problems
from megatron_vpmoe.config.schema import FieldSpec, RunConfig, fields
from megatron_vpmoe.planning.predict import Prediction, predict
from megatron_vpmoe.runtime.machines import Fleet

_TP, _PP, _EP = "tensor_model_parallel_size", "pipeline_model_parallel_size", "expert_model_parallel_size"
_FIELDS = (
    _TP,
    "sequence_parallel",
    _PP,
    _EP,
    "nproc_per_node",
    "overlap_grad_reduce",
    "micro_batch_size",
    "compile",
    "recompute_granularity",
    "recompute_method",
    "recompute_num_layers",
    "recompute_modules",
)
_KEPT: dict[str, Any] = dict.fromkeys(_FIELDS[-4:])
_TO_COMPILE = 12
"""So many layouts, the fastest that fit, are tried with ``compile`` too, which hastens all alike."""


@functools.cache
def _known() -> dict[str, FieldSpec]:
    return fields()


class Layout(NamedTuple):
    """Fields of a configuration that say how a run is spread, and what is kept of it."""

    values: tuple[tuple[str, Any], ...]

    @classmethod
    def of(cls, given: dict[str, Any]) -> Layout:
        """From name -> value; lists become tuples, so that layouts can be keys."""
        return cls(tuple((name, tuple(v) if isinstance(v := given[name], list) else v) for name in _FIELDS))

    @property
    def given(self) -> dict[str, Any]:
        """Name of a field -> its value."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in self.values}

    def applied(self, cfg: RunConfig) -> RunConfig:
        """``cfg`` with these fields; no rule is looked at."""
        sections: dict[str, dict[str, Any]] = {}
        for name, value in self.given.items():
            sections.setdefault(_known()[name].section, {})[name] = value
        return cfg.model_copy(
            update={key: getattr(cfg, key).model_copy(update=values) for key, values in sections.items()}
        )

    def flags(self) -> list[str]:
        """The same as words of a command line."""
        words = []
        for name, value in self.given.items():
            flag = _known()[name].flag.split()[0]
            if isinstance(value, bool):
                words.append(flag if value else flag.replace("--", "--no-", 1))
            else:
                words += [
                    flag,
                    "null" if value is None else f"[{','.join(value)}]" if isinstance(value, list) else str(value),
                ]
        return words


@dataclass(frozen=True)
class Planned:
    """A layout on a fleet.

    Attributes:
        layout: the fields.
        gpus: of each kind of parallelism: DP, EP, TP, PP.
        micro_batch: rows.
        recomputation: in words.
        memory: bytes of a process, as `config.memory` estimates it.
        available: bytes that a process can fill.
        prediction: of a step.
        as_configured: whether these are the configuration's own values.
    """

    layout: Layout
    gpus: dict[str, int]
    micro_batch: int
    recomputation: str
    memory: int
    available: int
    prediction: Prediction
    as_configured: bool

    @property
    def fits(self) -> bool:
        """Whether the memory suffices."""
        return self.memory <= self.available

    def __str__(self) -> str:
        spread = " ".join(f"{name}{count}" for name, count in self.gpus.items() if count > 1) or "1 GPU"
        choice = self.layout.given["compile"]
        compiled = "" if choice == "off" else f", {choice}"
        return f"{spread} mb{self.micro_batch} {self.recomputation}{compiled}"


@dataclass
class Plan:
    """All layouts of a fleet.

    Attributes:
        fleet: of what.
        layouts: those that fit by step time, then those that do not by memory.
        refused: why others are not admitted, with how many that concerns.
    """

    fleet: Fleet
    layouts: list[Planned] = field(default_factory=list)
    refused: dict[str, int] = field(default_factory=dict)

    @property
    def best(self) -> Planned | None:
        """The fastest that fits."""
        return self.layouts[0] if self.layouts and self.layouts[0].fits else None


def plan(cfg: RunConfig, fleet: Fleet, tell: Callable[[int, int], object] = lambda done, total: None) -> Plan:
    """Try every layout, the configuration's own among them.

    Args:
        cfg: the run; what is no matter of layout stays as it is, the rows of a step among them.
        fleet: the devices.
        tell: is told how many layouts are done, of how many.
    """
    made, own = Plan(fleet), as_configured(cfg, fleet)
    admitted: dict[Layout, RunConfig] = {}
    if (applied := _admitted(own, cfg, fleet, made)) is not None:
        admitted[own] = applied
    for spread in _spreads(cfg, fleet):
        if _admitted(Layout.of(spread), cfg, fleet, made) is None:
            continue
        for kept in _kept(cfg, spread[_PP]):
            layout = Layout.of(spread | kept)
            if (applied := _admitted(layout, cfg, fleet, made)) is not None:
                admitted.setdefault(layout, applied)
    for done, (layout, applied) in enumerate(admitted.items()):
        tell(done, len(admitted))
        made.layouts.append(planned(layout, applied, fleet, is_own=layout == own))
    made.layouts.sort(key=_order)
    made.layouts += list(_compiled(cfg, made, own))
    made.layouts.sort(key=_order)
    return made


def _order(each: Planned) -> tuple[bool, float]:
    return not each.fits, each.prediction.step_seconds if each.fits else each.memory


def _compiled(cfg: RunConfig, made: Plan, own: Layout) -> Iterator[Planned]:
    """The fastest layouts with ``compile``; of a CPU none: what it saves there is measured and small."""
    if made.fleet.machine.is_cpu:
        return
    fastest = [each for each in made.layouts[:_TO_COMPILE] if each.fits and each.layout.given["compile"] == "off"]
    for each in fastest:
        for choice in get_args(_known()["compile"].info.annotation)[1:]:
            layout = Layout.of(each.layout.given | {"compile": choice})
            if layout != own and (applied := _admitted(layout, cfg, made.fleet, made)) is not None:
                yield planned(layout, applied, made.fleet, is_own=False)


def planned(layout: Layout, applied: RunConfig, fleet: Fleet, *, is_own: bool) -> Planned:
    """One layout and what it comes to; ``applied`` is the configuration with it."""
    p = applied.parallel
    tp, pp = p.tensor_model_parallel_size, p.pipeline_model_parallel_size
    return Planned(
        layout,
        {"DP": fleet.gpus // (tp * pp), "EP": p.expert_model_parallel_size, "TP": tp, "PP": pp},
        applied.training.micro_batch_size,
        recomputation_words(applied),
        memory_estimate(applied, on_cpu=fleet.machine.is_cpu, world=fleet.gpus).total,
        int(fleet.machine.memory_gib * 2**30 * fleet.machine.usable),
        predict(applied, fleet),
        is_own,
    )


def as_configured(cfg: RunConfig, fleet: Fleet) -> Layout:
    """What the configuration says itself; a fleet's nodes decide how many processes one has."""
    own = {name: getattr(getattr(cfg, _known()[name].section), name) for name in _FIELDS}
    return Layout.of(own | {"nproc_per_node": fleet.per_node})


def _admitted(layout: Layout, cfg: RunConfig, fleet: Fleet, made: Plan) -> RunConfig | None:
    """``cfg`` so laid out, if no rule is broken; else the rules are counted."""
    applied = layout.applied(cfg)
    problems = find_problems(applied, fleet.gpus)
    for text in {problem.text for problem in problems}:
        made.refused[text] = made.refused.get(text, 0) + 1
    return None if problems else applied


def _divisors(number: int, most: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, most) + 1) if number % divisor == 0]


def _spreads(cfg: RunConfig, fleet: Fleet) -> Iterator[dict[str, Any]]:
    """Sizes of parallelism and the micro-batch. Layers are taken as evenly shared out as the configuration says."""
    experts = cfg.moe.num_experts or 1
    rows = [2**power for power in range(cfg.training.global_batch_size.bit_length())]
    for tp in _divisors(fleet.per_node, fleet.per_node):
        for pp in _divisors(fleet.gpus // tp, cfg.model.num_layers):
            for ep in _divisors(fleet.gpus // pp, experts):
                if ep & (ep - 1) or tp & (tp - 1):
                    continue  # powers of two: of others there are many, and nothing speaks for them
                for micro_batch in rows:
                    if micro_batch * (fleet.gpus // (tp * pp)) > cfg.training.global_batch_size:
                        break
                    yield {
                        _TP: tp,
                        "sequence_parallel": tp > 1,
                        _PP: pp,
                        _EP: ep,
                        "nproc_per_node": fleet.per_node,
                        "micro_batch_size": micro_batch,
                        "overlap_grad_reduce": True,
                        "compile": "off",
                        **_KEPT,
                    }


def _kept(cfg: RunConfig, stages: int) -> list[dict[str, Any]]:
    """Ways of recomputation: none, parts of each layer, some layers of a stage, all."""
    layers = cfg.model.num_layers // stages
    counts = sorted({max(1, layers * share // 8) for share in (1, 2, 4, 6)} - {layers})
    feed_forward = "moe" if cfg.moe.num_experts else "mlp"
    ways: list[dict[str, Any]] = [{}]
    for modules in (["core_attn"], [feed_forward], ["core_attn", feed_forward]):
        ways.append({"recompute_granularity": "selective", "recompute_modules": modules})
    for count in counts:
        ways.append({"recompute_granularity": "full", "recompute_method": "block", "recompute_num_layers": count})
    return [*ways, {"recompute_granularity": "full"}]


def recomputation_words(cfg: RunConfig) -> str:
    """What is computed again."""
    t = cfg.training
    if t.recompute_granularity is None:
        return "all kept"
    if t.recompute_granularity == "selective":
        return f"again: {'+'.join(t.recompute_modules or ['core_attn'])}"
    if t.recompute_method == "block":
        return f"again: {t.recompute_num_layers or 1} layers"
    return "again: all"
