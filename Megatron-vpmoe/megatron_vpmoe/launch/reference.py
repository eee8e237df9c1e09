"""``vpmoe train --help``: usage and a reference of every field, read from the schema."""

from __future__ import annotations

import textwrap

import yaml

from megatron_vpmoe.config.flags import bounds
from megatron_vpmoe.config.load import expected
from megatron_vpmoe.config.provenance import is_binding
from megatron_vpmoe.config.schema import FieldSpec, fields, section_types

_USAGE = """usage: vpmoe train CONFIG [--field-name value ...] [--dry-run] [--debug]

Train the run that CONFIG (a YAML file, see configs/) describes. Any field below overrides the file:
--micro-batch-size 4, --bf16 or --no-bf16, --window-size null, each once. Paths are relative to the working directory.
A field that "binds" is the same in a run and in what resumes it (see --allow-provenance-change).

  --help      this text
  --dry-run   print the resolved configuration, its parameters and its memory, and exit (with 2: does not fit)
  --debug     show tracebacks and the launcher's own log
"""


def help_text() -> str:
    """Usage and every field of the configuration with its flag, type, default and meaning."""
    lines = [_USAGE]
    for section, section_type in section_types().items():
        lines.append(f"{section}: {(section_type.__doc__ or '').strip()}")
        for spec in fields().values():
            if spec.section == section:
                lines.append(f"  {spec.flag}  ({'; '.join(facts(spec))})")
                lines += [f"      {line}" for line in textwrap.wrap(spec.info.description or "", 94)]
        lines.append("")
    return "\n".join(lines)


def facts(spec: FieldSpec) -> list[str]:
    """What a field takes and from where to where, what it is by default, and whether it binds a resume."""
    limits = bounds(spec)
    span = "" if limits is None else f", {_number(limits.low)} to {_number(limits.high)}"
    return [expected(spec) + span, _default(spec), *(["binds"] if is_binding(spec.section, spec.name) else [])]


def _number(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.8g}"


def _default(spec: FieldSpec) -> str:
    if spec.info.is_required():
        return "required"
    return "default " + yaml.safe_dump(spec.info.get_default(call_default_factory=True)).splitlines()[0]
