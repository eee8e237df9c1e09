"""YAML files with a memory: every value keeps the file and line it came from, through a chain of ``extends``."""

from __future__ import annotations

import glob
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import yaml

from megatron_vpmoe.config.settings_file import read_settings, shown
from megatron_vpmoe.errors import ConfigError

_DEEPEST, _LARGEST = 10, 4_000  # levels of nesting, and keys and values in all
_MOST_FILES = 32


class Given(NamedTuple):
    """A value as somebody wrote it, and where."""

    value: Any
    source: str


class _Loader(yaml.SafeLoader):
    """SafeLoader with YAML 1.2's scalars: 1e-4 is a number; yes, no, on and off are strings; no dates or octals.

    A value is what is written in its place: no aliases, which can multiply without end, no tags, and no nesting beyond
    what any field has.
    """

    yaml_implicit_resolvers: ClassVar[dict[str, list[tuple[str, re.Pattern[str]]]]] = {}
    _depth = _nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event: Any = self.peek_event()
        self._nodes += 1
        refused = {
            "an alias; write the value out": isinstance(event, yaml.AliasEvent),
            f"the tag {getattr(event, 'tag', None)!r:.40}; write the plain value": getattr(event, "tag", None),
            f"nested more than {_DEEPEST} deep": self._depth > _DEEPEST,
            f"more than {_LARGEST:,} values": self._nodes > _LARGEST,
        }
        for what, is_so in refused.items():
            if is_so:
                raise yaml.MarkedYAMLError(problem=what, problem_mark=event.start_mark)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            raise yaml.MarkedYAMLError(problem="a key is given twice", problem_mark=node.start_mark)
        return mapping


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:null", re.compile(r"^(?:~|null|Null|)$"), ["~", "n", "N", ""])
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?[0-9][0-9_]*$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?|\.inf|\.nan)$"),
    list("-+.0123456789"),
)


def _construct_float(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> float:
    text = str(loader.construct_scalar(node)).replace("_", "")
    return float(text.replace(".inf", "inf").replace(".nan", "nan"))


def _construct_int(loader: yaml.SafeLoader, node: yaml.ScalarNode) -> int:
    return int(str(loader.construct_scalar(node)).replace("_", ""))


_Loader.add_constructor("tag:yaml.org,2002:float", _construct_float)
_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_scalar(text: str) -> Any:
    """The value of ``text`` under the same rules as in a file; text that is not valid YAML stays a string."""
    try:
        return yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, ValueError):
        return text


@lru_cache(maxsize=_MOST_FILES)
def _composed(text: str) -> yaml.Node | None:
    """The nodes of a file, which nobody changes: what many files extend is taken apart once."""
    return yaml.compose(text, Loader=_Loader)


def _read_root(path: Path, asked_by: str) -> yaml.MappingNode:
    try:
        text = read_settings(path)
    except ValueError as error:
        nearby = glob.glob(str(Path(glob.escape(str(path.parent).replace("\0", ""))) / "*.yaml"))
        files = [shown(found) for found in sorted(nearby)[:8]]
        remedy = f"files there: {', '.join(files)}" if files else "give the path of a run's YAML"
        raise ConfigError(f"cannot read {str(path)[:500]}: {error}", source=asked_by, remedy=remedy) from error
    try:
        root = _composed(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"not valid YAML here: {what}", source=where, remedy="mend the line") from error
    if not isinstance(root, yaml.MappingNode):
        raise ConfigError("a configuration is a mapping of sections", source=str(path), remedy="see configs/")
    return root


def _entries(node: yaml.MappingNode, where: str, path: Path, problems: list[str]) -> list[tuple[str, yaml.Node, str]]:
    """(key, value node, "file:line") of a mapping; keys that are repeated or no words become problems."""
    seen: dict[str, str] = {}
    entries = []
    for key_node, value_node in node.value:
        key, source = key_node.value, f"{path}:{key_node.start_mark.line + 1}"
        if not (isinstance(key, str) and key):
            problems.append(f"{source}: a key of {where.rstrip('.') or 'the file'} is no word")
            continue
        if key in seen:
            problems.append(f"{source}: {where}{key} is given twice (first at {seen[key]}); keep one")
        seen[key] = source
        entries.append((key, value_node, source))
    return entries


def _construct(node: yaml.Node, source: str) -> Any:
    try:
        return _Loader("").construct_object(node, deep=True)
    except (yaml.YAMLError, ValueError) as error:
        what = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"a value that cannot be read: {what}", source=source, remedy="mend the value") from error


def _parents(node: yaml.Node, source: str, problems: list[str]) -> list[str]:
    """The paths that ``extends`` names: one, or a list."""
    value = _construct(node, source)
    named = value if isinstance(value, list) else [value]
    if not named or not all(isinstance(parent, str) and parent.isprintable() for parent in named):
        problems.append(f"{source}: extends takes one relative path or a list of them, not {shown(value)}")
        return []
    return named


def extended_paths(path: Path) -> list[Path]:
    """The files that ``path`` itself extends, in their order; mistakes in it are left to ``read_chain``."""
    entries = _entries(_read_root(path, "extends"), "", path, [])
    return [
        path.parent / parent
        for section, node, source in entries
        if section == "extends"
        for parent in _parents(node, source, [])
    ]


def read_chain(path: Path, problems: list[str]) -> dict[str, dict[str, Given]]:
    """Section -> key -> value of a file and everything it extends, key by key.

    A file wins over what it extends; of several files that it extends, a later one wins over an earlier.

    Args:
        path: the YAML file; ``extends`` inside it is relative to the file that says it.
        problems: receives repeated keys and sections that are not mappings.

    Raises:
        ConfigError: a file cannot be read or parsed, or the chain of ``extends`` closes on itself.
    """
    return _read_chain(path, "command line", (), [], problems)


def _read_chain(
    path: Path, asked_by: str, chain: tuple[Path, ...], read: list[Path], problems: list[str]
) -> dict[str, dict[str, Given]]:
    root = _read_root(path, asked_by)
    read.append(path)
    if path.resolve() in [earlier.resolve() for earlier in chain]:
        circle = " -> ".join(str(p) for p in [*chain, path])
        raise ConfigError(f"extends runs in a circle: {circle}", source=asked_by, remedy="remove one extends")
    if len(read) > _MOST_FILES:
        remedy = "write out what they say; a file that is extended along two ways is read twice"
        raise ConfigError(f"extends reads more than {_MOST_FILES} files", source=asked_by, remedy=remedy)
    merged: dict[str, dict[str, Given]] = {}
    own: dict[str, dict[str, Given]] = {}
    for section, node, source in _entries(root, "", path, problems):
        if section == "extends":
            for parent in _parents(node, source, problems):
                _lay_over(merged, _read_chain(path.parent / parent, source, (*chain, path), read, problems))
        elif isinstance(node, yaml.MappingNode):
            values = own.setdefault(section, {})
            for key, value_node, key_source in _entries(node, f"{section}.", path, problems):
                values[key] = Given(_construct(value_node, key_source), key_source)
        else:
            own.setdefault(section, {})[""] = Given(_construct(node, source), source)
    _lay_over(merged, own)
    return merged


def _lay_over(below: dict[str, dict[str, Given]], above: dict[str, dict[str, Given]]) -> None:
    for section, values in above.items():
        below.setdefault(section, {}).update(values)
