"""From a YAML file and flags to a ``RunConfig``, or to one error that lists every problem with file, line and key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import ValidationError

from megatron_vpmoe.config.flags import accepted, nearest, parse_flags
from megatron_vpmoe.config.rule import Problem
from megatron_vpmoe.config.rules import find_problems
from megatron_vpmoe.config.schema import (
    RENAMED,
    RETIRED,
    FieldSpec,
    RunConfig,
    fields,
    is_passed_over,
    named_today,
    section_types,
)
from megatron_vpmoe.config.schema_section import BOUND
from megatron_vpmoe.config.settings_file import shown
from megatron_vpmoe.config.yaml_source import Given, read_chain
from megatron_vpmoe.errors import ConfigError

_TYPE_NAMES = {int: "an integer", float: "a number", bool: "true or false", str: "a string", list: "a list"}
_SAID_BY_PYDANTIC = ("finite_number", "string_pattern_mismatch", "too_long")
Values = dict[str, dict[str, Given]]


def load_config(path: str | Path, overrides: list[str] | None = None, *, nodes: int | None = None) -> RunConfig:
    """Read, override, check.

    Args:
        path: the run's YAML.
        overrides: command-line words in Megatron's flag spelling; they win over the files.
        nodes: machines of the run, if known; with nproc_per_node it adds the rules on batch and expert distribution.

    Raises:
        ConfigError: naming every unknown key (with the nearest valid name), wrong type and broken rule at once.
    """
    path = Path(path)
    problems: list[str] = []
    values = read_chain(path, problems)
    for section, given in parse_flags(list(overrides or []), problems).items():
        values.setdefault(section, {}).update(given)
    values = _known_only(values, problems)
    try:
        cfg = RunConfig.model_validate(
            {section: {key: given.value for key, given in keys.items()} for section, keys in values.items()}
        )
    except ValidationError as error:
        problems += [_describe(dict(detail), values, path) for detail in error.errors()]
    else:
        world_size = None if nodes is None else nodes * cfg.parallel.nproc_per_node
        problems += [_locate(problem, values) for problem in find_problems(cfg, world_size)]
        if not problems:
            return cfg
    raise _report(problems, str(path))


def check_world(cfg: RunConfig, world_size: int) -> None:
    """Check every rule again, now with the number of processes over all nodes.

    Raises:
        ConfigError: listing every broken rule.
    """
    problems = [_locate(problem, {}) for problem in find_problems(cfg, world_size)]
    if problems:
        raise _report(problems, f"{cfg.training.run_name} on {world_size} processes")


def _report(problems: list[str], source: str) -> ConfigError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    what = "\n".join([f"{count} in the configuration:", *(f"  - {problem}" for problem in problems)])
    remedy = "correct the values named above; `vpmoe train --help` explains every field"
    return ConfigError(what, source=source, remedy=remedy)


def _known_only(values: Values, problems: list[str]) -> Values:
    """``values`` without unknown sections and keys, each of which becomes a problem; every section is present."""
    sections, known = section_types(), fields()
    kept: Values = {section: {} for section in sections}
    for section, keys in values.items():
        if section not in sections:
            source = next((given.source for given in keys.values()), None)
            hint = f"nearest: {', '.join(nearest(section, list(sections)))}"
            if section in known:
                hint = f"{section} belongs under {known[section].section}:"
            problems.append(f"{source or section}: unknown section {section}; {hint}")
            continue
        for key, given in keys.items():
            if key == "":
                if given.value is not None:
                    problems.append(f"{given.source}: {section} is a section of keys, not {shown(given.value)}")
            elif key in sections[section].model_fields:
                kept[section][key] = given
            elif is_passed_over(section, key, given.value):
                continue
            elif key in RENAMED and RENAMED[key].section == section and RENAMED[key].name not in keys:
                kept[section] |= {
                    name: Given(value, given.source) for name, value in named_today(section, {key: given.value}).items()
                }
            else:
                problems.append(f"{given.source}: unknown key {section}.{key}; {_hint(section, key, known)}")
    return kept


def _hint(section: str, key: str, known: dict[str, FieldSpec]) -> str:
    if key in RETIRED:
        return f"it is gone: {RETIRED[key].reason}"
    if key in RENAMED:
        new = RENAMED[key]
        values = ", ".join(f"{shown(now)} for {shown(then)}" for then, now in new.values.items())
        return f"it is {new.section}.{new.name} now ({values})"
    if key in known:
        return f"it belongs under {known[key].section}:"
    own = [name for name, spec in known.items() if spec.section == section]
    close = [n for n in nearest(key, list(known))]
    names = dict.fromkeys(known[n].key for n in [*close, *nearest(key, own, 1)])
    return f"nearest: {', '.join(names)}"


def expected(spec: FieldSpec) -> str:
    """What a field accepts, in words: its types, or its choices."""
    types = accepted(spec)
    choices = sorted(entry for entry in types if isinstance(entry, str))
    words = [repr(choice) for choice in choices] or [_TYPE_NAMES[t] for t in _TYPE_NAMES if t in types]
    return " or ".join([*words, "null"] if type(None) in types else words)


def _describe(detail: dict[str, Any], values: Values, path: Path) -> str:
    """One pydantic finding as "source: section.key = value: what was expected", also inside a list."""
    section, name, *inside = detail["loc"]
    spec, given = fields()[name], values[section].get(name)
    key = spec.key + "".join(f"[{step}]" if isinstance(step, int) else f".{step}" for step in inside)
    if given is None:
        return f"{path}: {key} is missing; it takes {expected(spec)}"
    if detail["type"] == "missing":
        return f"{given.source}: {key} is missing"
    if detail["type"] == "extra_forbidden":
        return f"{given.source}: unknown key {key}; {spec.key} is {spec.info.description}"
    value = detail["input"]
    found = f"{given.source}: {key} = {shown(value)}"
    if detail["type"] == BOUND:
        return f"{found} {detail['msg']}"
    if inside or detail["type"] in _SAID_BY_PYDANTIC:
        return f"{found}: {detail['msg']}"
    choices = sorted(entry for entry in accepted(spec) if isinstance(entry, str))
    hint = f"; nearest: {nearest(value, choices, 1)[0]!r}" if isinstance(value, str) and choices else ""
    return f"{found} ({type(value).__name__}), expected {expected(spec)}{hint}"


def _locate(problem: Problem, values: Values) -> str:
    """A rule's finding behind the places that gave the fields it names."""
    known = fields()
    sources = []
    for name in problem.names:
        given = values.get(known[name].section, {}).get(name)
        sources.append(f"{known[name].key} ({given.source})" if given else known[name].key)
    return f"{', '.join(sources)}: {problem.text}"
