"""Which parameter goes to which optimizer: declared rules on names, each parameter matching exactly one."""

from __future__ import annotations

import fnmatch
import json
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from rich.table import Table

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.files import write_atomically
from megatron_vpmoe.optim.matrix_layout import matrix_layout
from megatron_vpmoe.runtime import stages

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

LearningRate = Literal["lr", "normuon_aux_lr", "decoupled_lr", "router_lr"]


@dataclass(frozen=True)
class Rule:
    """What happens to the parameters whose dotted name matches one of ``patterns`` (shell wildcards)."""

    name: str
    patterns: tuple[str, ...]
    optimizer: Literal["normuon", "adamw"]
    lr: LearningRate
    weight_decay: bool

    def matches(self, parameter_name: str) -> bool:
        """Whether any pattern matches the whole name."""
        return any(fnmatch.fnmatchcase(parameter_name, pattern) for pattern in self.patterns)


RULES: tuple[Rule, ...] = (
    Rule("embedding", ("embedding.word_embeddings.weight",), "adamw", "decoupled_lr", True),
    Rule("output layer", ("output_layer.weight",), "adamw", "decoupled_lr", True),
    Rule(
        "attention matrices",
        tuple(
            f"*.self_attention.{part}.weight" for part in ("linear_qkv", "linear_tpa_a", "linear_tpa_b", "linear_proj")
        ),
        "normuon",
        "lr",
        True,
    ),
    Rule(
        "feed-forward matrices",
        tuple(f"*.mlp.{part}linear_fc{i}.weight" for part in ("", "shared_experts.") for i in (1, 2)),
        "normuon",
        "lr",
        True,
    ),
    Rule("expert matrices", ("*.mlp.experts.*weight", "*.mlp.experts.*weight[0-9]*"), "normuon", "lr", True),
    Rule(
        "state space matrices",
        tuple(f"*.mixer.{part}_proj.weight" for part in ("in", "x", "dt", "out")),
        "normuon",
        "lr",
        True,
    ),
    Rule("convolutions", ("*.mixer.conv_weight",), "adamw", "normuon_aux_lr", True),
    Rule(
        "denoiser's levels and estimate",
        ("*level_modulation.weight", "*.final_modulation.weight", "*.estimate.weight"),
        "adamw",
        "normuon_aux_lr",
        True,
    ),
    Rule(
        "mixture's attention, router and adapters",
        ("decoder.latent_attention.linear_*.weight", "decoder.router.weight", "decoder.adapters.*.weight"),
        "adamw",
        "normuon_aux_lr",
        True,
    ),
    Rule("state space decays", ("*.mixer.A_log", "*.mixer.D"), "adamw", "normuon_aux_lr", False),
    Rule("router", ("*.mlp.router.weight",), "adamw", "router_lr", True),
    Rule("norm scales", ("*layernorm.weight",), "adamw", "normuon_aux_lr", False),
    Rule("biases", ("*bias", "*bias[0-9]*"), "adamw", "normuon_aux_lr", False),
    Rule("softmax sinks", ("*.self_attention.sink",), "adamw", "normuon_aux_lr", False),
    Rule("rotary frequencies", ("*grape_log_freq",), "adamw", "normuon_aux_lr", False),
    Rule("value residual", ("*value_residual_scale",), "adamw", "normuon_aux_lr", False),
)
"""The rules of the vpMoE, vpDense and Qwen3 layers, of state space layers, of denoisers and of mixtures."""


def slug(rule: str) -> str:
    """A rule's name as it stands in metrics' tags, such as "feed_forward_matrices"."""
    return rule.replace(" ", "_").replace("-", "_")


FROZEN = "frozen"
"""In the place of an optimizer: the parameter is not trained."""


@dataclass(frozen=True)
class AssignmentRow:
    """What was decided for one parameter."""

    name: str
    """Dotted name without the wrappers' ``module.``; layers are counted over all stages of a pipeline."""
    shape: tuple[int, ...]
    """Local shape on this rank."""
    rule: str
    optimizer: str
    """normuon, adamw, or frozen (``training.train_only``)."""
    lr_field: str
    lr: float
    """Peak learning rate, multiplied."""
    lr_multiplier: float
    weight_decay: float
    matrices: int
    """Logical matrices that are orthogonalised; 0 under AdamW."""
    expert: bool
    """Whether gradients are reduced over the expert-data-parallel group (``allreduce`` is False)."""


def assignment_table(
    model: torch.nn.Module | Sequence[torch.nn.Module], cfg: RunConfig, rules: Sequence[Rule] = RULES
) -> list[AssignmentRow]:
    """Decide for every parameter of ``model`` (or of its chunks); a frozen one has its rule and no learning rate.

    Under ``optimizer: adam`` the rules keep their learning rates and decays and every optimizer is AdamW.

    Raises:
        ConfigError: a parameter that no rule or more than one rule matches, or one that NorMuon cannot take; a learning
            rate's multiplier or a rule's decay that reaches no trained parameter, or two multipliers for one.
    """
    return [row for row, _ in assigned_parameters(model, cfg, rules)]


def assigned_parameters(
    model: torch.nn.Module | Sequence[torch.nn.Module], cfg: RunConfig, rules: Sequence[Rule] = RULES
) -> list[tuple[AssignmentRow, torch.nn.Parameter]]:
    """``assignment_table`` with the parameter beside each row; a collective of the stages of a pipeline.

    A pattern or a rule needs a match on one of the stages alone.
    """
    named = list(_named_parameters(model))
    found = {name: find_rule(name, rules) for name, _ in named}
    trained = _over_stages([(name, found[name].name) for name, param in named if param.requires_grad])
    factors = _lr_factors([name for name, _ in trained], cfg)
    decays = _rule_decays({rule for _, rule in trained}, cfg)
    return [(_row(name, param, found[name], factors.get(name), decays, cfg), param) for name, param in named]


def _over_stages(trained: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """The same of the whole model, where this is one stage of a pipeline."""
    from megatron.core import parallel_state

    if not parallel_state.model_parallel_is_initialized():
        return trained
    return [item for stage in stages.gather_stages(trained) for item in stage]


def _lr_factors(names: list[str], cfg: RunConfig) -> dict[str, float]:
    """The multiplier of each name's learning rate."""
    factors = dict.fromkeys(names, 1.0)
    taken: dict[str, str] = {}
    for multiplier in cfg.optim.lr_multipliers or ():
        matched = fnmatch.filter(names, multiplier.pattern)
        if not matched:
            raise ConfigError(
                f"optim.lr_multipliers: no parameter matches {multiplier.pattern!r}",
                remedy="whole dotted names as in assignment.json, such as '*.mlp.experts.fc1_weight', or leave it out",
            )
        for name in matched:
            if name in taken:
                raise ConfigError(
                    f"optim.lr_multipliers: {name} is matched by {taken[name]!r} and by {multiplier.pattern!r}",
                    remedy="patterns that do not overlap",
                )
            taken[name], factors[name] = multiplier.pattern, multiplier.factor
    return factors


def _rule_decays(rules: set[str], cfg: RunConfig) -> dict[str, float]:
    """The decays that the configuration gives to rules by name."""
    decays: dict[str, float] = {}
    for entry in cfg.optim.weight_decays or ():
        if entry.rule not in rules or entry.rule in decays:
            reason = "is named twice" if entry.rule in decays else "matches no parameter of this model"
            raise ConfigError(
                f"optim.weight_decays: the rule {entry.rule!r} {reason}",
                remedy=f"one entry for any of: {', '.join(sorted(rules))}",
            )
        decays[entry.rule] = entry.weight_decay
    return decays


def find_rule(name: str, rules: Sequence[Rule] = RULES) -> Rule:
    """The one rule that matches ``name``.

    Raises:
        ConfigError: none does, or more than one.
    """
    matching = [rule for rule in rules if rule.matches(name)]
    if len(matching) != 1:
        found = "no rule" if not matching else "several rules: " + ", ".join(rule.name for rule in matching)
        raise ConfigError(
            f"parameter {name} is matched by {found}",
            source="the optimizer's assignment rules",
            remedy="megatron_vpmoe/optim/assignment.py: exactly one rule has to name it",
        )
    return matching[0]


def _row(
    name: str, param: torch.Tensor, rule: Rule, factor: float | None, decays: dict[str, float], cfg: RunConfig
) -> AssignmentRow:
    """``factor``: on the learning rate; None of a frozen parameter."""
    optimizer = FROZEN if factor is None else "adamw" if cfg.optim.optimizer == "adam" else rule.optimizer
    peak_lrs = {
        "lr": cfg.optim.lr, "normuon_aux_lr": cfg.aux_lr, "decoupled_lr": cfg.embedding_lr, "router_lr": cfg.router_lr
    }  # fmt: skip
    decay = decays.get(rule.name, cfg.optim.weight_decay if rule.weight_decay else 0.0)
    return AssignmentRow(
        name=name,
        shape=tuple(param.shape),
        rule=rule.name,
        optimizer=optimizer,
        lr_field=rule.lr,
        lr=peak_lrs[rule.lr] * (factor or 0.0),
        lr_multiplier=1.0 if factor is None else factor,
        weight_decay=0.0 if factor is None else decay,
        matrices=matrix_layout(param, name).count if optimizer == "normuon" else 0,
        expert=not getattr(param, "allreduce", True),
    )


def _named_parameters(
    model: torch.nn.Module | Sequence[torch.nn.Module],
) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """With the numbers that layers have in the whole model, not in this stage of a pipeline."""
    for chunk in [model] if isinstance(model, torch.nn.Module) else model:
        whole = chunk
        while isinstance(inner := getattr(whole, "module", None), torch.nn.Module):
            whole = inner
        absolute = getattr(whole, "absolute_name", str)
        for name, param in chunk.named_parameters():
            yield absolute(re.sub(r"^(module\.)+", "", name)), param


def render_assignment_table(rows: Iterable[AssignmentRow], caption: str | None = None) -> Table:
    """A rich table with one line for each rule and learning rate; ``write_assignment_table`` has one a parameter."""
    table = Table(title="Optimizer assignment", title_justify="left", caption=caption, caption_justify="left")
    for column in ("parameters", "tensors", "elements", "matrices", "optimizer", "peak lr", "decay"):
        table.add_column(column, justify="left" if column in ("parameters", "optimizer") else "right")
    alike: dict[tuple[str, float], list[AssignmentRow]] = {}
    for row in rows:
        alike.setdefault((row.rule, row.lr), []).append(row)
    for (rule, lr), members in alike.items():
        elements, matrices = sum(math.prod(row.shape) for row in members), sum(row.matrices for row in members)
        first = members[0]
        table.add_row(
            rule, f"{len(members):,}", f"{elements:,}", f"{matrices:,}" if matrices else "", first.optimizer,
            f"{lr:g}", f"{first.weight_decay:g}",
        )  # fmt: skip
    return table


def write_assignment_table(rows: Iterable[AssignmentRow], path: Path) -> None:
    """Store the rows as a JSON list of objects, one parameter a line."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    write_atomically(path, f"[\n{lines}\n]\n".encode())
