"""Overrides as Megatron spells flags: ``--micro-batch-size 4``, ``--bf16``, ``--no-bf16``, ``--window-size null``.

A list is given as YAML in one word: ``--blend '[{path: a, weight: 7}, {path: b, weight: 3}]'``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, get_args, get_origin

from pydantic import AfterValidator

from megatron_vpmoe.config.schema import RETIRED, FieldSpec, fields
from megatron_vpmoe.config.schema_section import Bounds
from megatron_vpmoe.config.settings_file import shown
from megatron_vpmoe.config.yaml_source import Given, parse_scalar

SOURCE = "command line"
_FLAG = re.compile(r"--([A-Za-z][\w-]*)(?:=(.*))?", re.DOTALL)


def nearest(name: str, candidates: list[str], count: int = 3) -> list[str]:
    """The candidates most like ``name``, best first; never empty."""
    name = name[:100]  # the search takes the square of a length
    return difflib.get_close_matches(name, candidates, count, 0.6) or difflib.get_close_matches(name, candidates, 1, 0)


def accepted(spec: FieldSpec) -> set[type | str]:
    """What a field's annotation permits: plain types (null: ``NoneType``), and the words of a choice."""

    def walk(annotation: Any) -> set[type | str]:
        if annotation in (type(None), bool, int, float, str) or isinstance(annotation, str):
            return {annotation}
        if get_origin(annotation) is list:
            return {list}
        return set().union(*(walk(argument) for argument in get_args(annotation) if argument is not None))

    return walk(spec.info.annotation)


def accepted_types(spec: FieldSpec) -> set[type]:
    """``accepted``, where a choice is a string."""
    return {str if isinstance(entry, str) else entry for entry in accepted(spec)}


def bounds(spec: FieldSpec) -> Bounds | None:
    """Between which numbers a field's value has to lie, of a list each of its entries; None: it is no number."""

    def walk(annotation: Any, metadata: Iterable[Any]) -> Bounds | None:
        of_this = (entry.func for entry in metadata if isinstance(entry, AfterValidator))
        found = next((check for check in of_this if isinstance(check, Bounds)), None)
        return found or next(filter(None, (walk(part, [part]) for part in get_args(annotation))), None)

    return walk(spec.info.annotation, spec.info.metadata)


def _value(spec: FieldSpec, text: str) -> Any:
    """``text`` as the field's type would have it written in YAML; a wrong type is left for validation to name."""
    types = accepted_types(spec)
    if str in types:
        return None if type(None) in types and text in ("null", "~") else text
    return parse_scalar(text)


def _take(spec: FieldSpec, attached: str | None, rest: list[str]) -> tuple[Any, str | None]:
    """Consume a field's value from the front of ``rest``. Returns (value, problem)."""
    if attached is None and rest and not _FLAG.fullmatch(rest[0]):
        attached = rest.pop(0)
    if attached is not None:
        return _value(spec, attached), None
    if bool in accepted_types(spec):
        return True, None
    return None, f"{SOURCE}: {spec.flag} needs a value"


def parse_flags(arguments: list[str], problems: list[str]) -> dict[str, dict[str, Given]]:
    """Section -> key -> value of the overrides.

    Args:
        arguments: everything after the configuration's path.
        problems: receives unknown flags (with the nearest names), repeated ones, missing values and stray words.
    """
    known = fields()
    result: dict[str, dict[str, Given]] = {}
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        match = _FLAG.fullmatch(word)
        if match is None:
            problems.append(f"{SOURCE}: {shown(word)} belongs to no flag; overrides are --field-name value")
            continue
        name, attached = match.group(1).replace("-", "_"), match.group(2)
        negated = name not in known and name.startswith("no_") and name[3:] in known
        spec = known.get(name[3:] if negated else name)
        if spec is None:
            flags = [known[n].flag for n in nearest(name, list(known))]
            gone = f" ({RETIRED[name].reason})" if name in RETIRED else ""
            problems.append(f"{SOURCE}: unknown flag {word.split('=')[0][:100]}{gone}; nearest: {', '.join(flags)}")
            while rest and not _FLAG.fullmatch(rest[0]):
                rest.pop(0)
            continue
        given = result.setdefault(spec.section, {})
        if spec.name in given:
            problems.append(f"{SOURCE}: {spec.flag} is given twice; keep one")
        if not negated:
            value, problem = _take(spec, attached, rest)
        elif bool in accepted_types(spec) and attached is None:
            value, problem = False, None
        else:
            value, problem = None, f"{SOURCE}: {word[:100]} does not fit; {spec.flag} takes a value"
        if problem:
            problems.append(problem)
        else:
            given[spec.name] = Given(value, f"{SOURCE} {spec.flag}")
    return result
