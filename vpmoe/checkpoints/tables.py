"""What is told of checkpoints, as text for a terminal or a pipe."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from vpmoe.checkpoints.contents import state_name
from vpmoe.checkpoints.difference import Pair, Tensor
from vpmoe.checkpoints.soundness import Listed

_SHOWN = 20
_WIDTH = 120
_LABEL = 17


def contents_text(found: Mapping[str, Any]) -> str:
    """What ``contents.inspected`` found."""
    told: list[tuple[str, str]] = [("", f"{found['path']}: {found['kind']}")]
    if found.get("checkpoint", found["path"]) != found["path"]:
        told.append(("checkpoint", found["checkpoint"]))
    told += _of_run(found)
    if model := found.get("model"):
        told.append(("model", _listed(model)))
    told += _of_origin(found.get("provenance") or {}, "trained with")
    if receipt := found.get("receipt"):
        key = receipt["key"]
        told.append(("made by", f"{key.get('kind')} {key.get('object') or ''}".rstrip() + f", {receipt['finished']}"))
        told += _of_origin(receipt.get("provenance") or {}, "made with")
    sound = "nothing says what they were" if found["sound"] is None else "names and sizes are sound"
    told.append(("files", "DAMAGED" if found["damages"] else sound))
    told += [("", f"  {each}") for each in (*(found["damages"] or ()), *found["unread"])]
    for each in found.get("checkpoints", ()):
        told.append((f"  {each['name']}", f"{decimal(each['bytes'])}{'' if each['sound'] else '  DAMAGED'}"))
    lines = [f"{label:<{_LABEL}}{text}" if label else text for label, text in told]
    return "\n".join(lines) + ("\n" + _rendered(_groups(found["tensors"])) if found["tensors"] else "")


def _of_run(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What says how far it was trained."""
    if (run := found.get("run")) is None:
        return [] if found.get("iteration") is None else [("iteration", _number(found["iteration"]))]
    consumed = {name: run[name] for name in ("rows", "positions", "tokens")}
    skipped = f"; {run['skipped_steps']:,} steps skipped" if run["skipped_steps"] else ""
    of = f"{_number(found['iteration'])} of {_number(run['iterations'])}"
    return [
        ("iteration", f"{of} of the run {run['name']}, {run['objective']}, {run['optimizer']}"),
        ("consumed", ", ".join(f"{_number(value)} {name}" for name, value in consumed.items()) + skipped),
        ("saved under", _listed(found["layout"])),
    ]


def _of_origin(block: Mapping[str, Any], label: str) -> list[tuple[str, str]]:
    if not block:
        return []
    git, here = block.get("git") or {}, block.get("hardware") or {}
    told = {
        label: f"git {git.get('sha')}{', dirty' if git.get('dirty') else ''}",
        "  configuration": str(block.get("config_hash") or ""),
        "  tokenizer": _listed(block.get("tokenizer")),
        "  dataset": str(block.get("dataset_manifest_sha256") or ""),
        "  packages": _listed(block.get("packages")),
    }
    if here:
        gpus, hosts = here.get("gpus"), here.get("hosts")
        cards = "GPUs unknown" if gpus is None else f"{len(gpus)} x {gpus[0]}" if gpus else "no GPU"
        parts = (here.get("cpu"), f"{here.get('cores')} cores", f"{here.get('memory_gib')} GiB", cards)
        told["  hardware"] = ", ".join(map(str, parts)) + f", {hosts} host{'s' if hosts != 1 else ''}"
    return [(name, text) for name, text in told.items() if text]


def _listed(entries: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{name} {_number(value)}" for name, value in (entries or {}).items() if value is not None)


def _groups(tensors: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    table = _table("state", "part", "tensors", "elements", "bytes", "dtypes")
    for state, groups in tensors.items():
        for group, entry in groups.items():
            numbers = (f"{entry['tensors']:,}", f"{entry['elements']:,}", decimal(entry["bytes"]))
            table.add_row(state, group, *numbers, ", ".join(entry["dtypes"]))
        totals = {name: sum(entry[name] for entry in groups.values()) for name in ("tensors", "elements", "bytes")}
        table.add_row(state, "all", f"{totals['tensors']:,}", f"{totals['elements']:,}", decimal(totals["bytes"]), "")
        table.add_section()
    return table


def tensor_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """One line a tensor."""
    return "\n".join(
        f"{row['name']}  {row['dtype']} {row['shape']}  {row['bytes']:,} bytes  {row['group']}" for row in rows
    )


def verified_lines(of: Listed, damages: Sequence[str]) -> list[str]:
    """What was found of one folder."""
    head = f"{of.folder}: {len(of.files)} files, {decimal(of.bytes)}: "
    return [head + (f"DAMAGED, {len(damages)} faults" if damages else "sound"), *(f"  {each}" for each in damages)]


def difference_text(pair: Pair, tensors: Sequence[Tensor], *, show_all: bool) -> str:
    """Configuration, provenance, and what of the tensors is not equal: of each kind of state how much, and the most."""
    lines = []
    for title, changed in (("configuration", pair.configuration), ("provenance", pair.provenance)):
        lines += [f"{title}: {'the same' if not changed else ''}".rstrip(), *(f"  {line}" for line in changed)]
    lines.append("tensors:")
    for state in dict.fromkeys(state_name(each.name) for each in tensors):
        mine = [each for each in tensors if state_name(each.name) == state]
        counts = {
            "equal bit for bit": sum(each.equal for each in mine),
            "differ": sum(not each.equal and each.only is None for each in mine),
            "only in the first": sum(each.only == "first" for each in mine),
            "only in the second": sum(each.only == "second" for each in mine),
        }
        largest = max((each.largest for each in mine), default=0.0)
        said = ", ".join(f"{count:,} {what}" for what, count in counts.items() if count)
        lines.append(f"  {state}: {said}" + (f"; max abs {largest:.3e}" if counts["differ"] else ""))
    listed = sorted((each for each in tensors if not each.equal), key=lambda each: -each.largest)
    shown = listed if show_all else listed[:_SHOWN]
    lines += [f"    {each.name}: {each}" for each in shown]
    lines += [f"    and {len(listed) - len(shown):,} more (--all)"] if len(shown) < len(listed) else []
    return "\n".join(lines)


def _table(*headings: str) -> Table:
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for heading in headings:
        table.add_column(heading, justify="right" if heading in ("tensors", "elements", "bytes") else "left")
    return table


def _rendered(table: Table) -> str:
    """For a pipe as for a terminal: nothing is cut to its width."""
    stream = io.StringIO()
    Console(file=stream, width=_WIDTH).print(table)
    return stream.getvalue().rstrip()


def _number(value: Any) -> str:
    return "unknown" if value is None else f"{value:,}" if isinstance(value, int) else str(value)
