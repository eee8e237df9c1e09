"""A ladder's report, from the records of its objects: ``ladder.json``, ``ladder.md`` (the table), ``ladder.png``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.files import sha256_of_file, write_atomically
from megatron_vpmoe.software import provenance
from vpmoe.eval.reports import markdown_table
from vpmoe.eval.reports import write_report as write_json
from vpmoe.steps import plotting, save_figure
from vpmoe.upcycle.ladder_file import Ladder

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SCHEMA_VERSION = 2
KIND = "ladder"
_DELTA = "Δ rung 1"
_CONVERSATIONS = ("exact as conversation", "Δ below")
_BEFORE = ("rung", "object", "job", "nats/token", "bits/byte", _DELTA, "exact", _DELTA)
_AFTER = ("validation, before → after", "job s (processor)", "evaluation s (processor)", "weights")
_TITLES = {
    "core8_centered_mean": "centered accuracy",
    "centered_mean": "centered accuracy",
    "bits_per_byte": "bits/byte",
    "exact_mean": "exact, mean of tasks",
}
"""How the number that a suite is known by is spelled."""

Record = dict[str, Any]


def write_report(ladder: Ladder, records: Sequence[Record], folder: Path) -> dict[str, Any]:
    """Write the three files; returns the report.

    Args:
        ladder: its settings.
        records: one an object, in the order of making.
        folder: of the report.
    """
    evaluated = with_deltas([record for record in records if "evaluation" in record])
    fed = [record for record in records if "evaluation" not in record]
    origins = {record["object"]: record["provenance"] or {} for record in records}
    report = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "config": str(ladder.path),
        "settings": ladder.evaluation.model_dump(mode="json") if ladder.evaluation else None,
        "provenance": provenance(
            config_hash=sha256_of_file(ladder.path),
            tokenizer={name: origin.get("tokenizer") for name, origin in origins.items()},
            dataset={name: origin.get("dataset_manifest_sha256") for name, origin in origins.items()},
        ),
        "time": total_time(records),
        "below": fed,
        "steps": evaluated,
    }
    # The JSON comes first: where it is, the two others are its.
    write_json(folder / "ladder.json", report)
    write_atomically(folder / "ladder.md", (table(evaluated, fed, report["time"]) + "\n").encode())
    if evaluated:
        plot(evaluated, folder / "ladder.png")
    return report


def with_deltas(records: Sequence[Record]) -> list[Record]:
    """The records with ``delta``: bits per byte and accuracy minus those of the first object of rung 1, if it is there;
    and one in each suite. With ``gain``: bits per byte, accuracy and that of conversations (``conversations``) minus
    those of the object that each was made from, as far as both have them.

    Between rungs nothing else compares: nats a token belong to a vocabulary. Nor do answers that were asked for in two
    forms: there a suite's ``delta`` is None.
    """
    of = {record["object"]: record["evaluation"] for record in records}
    first: Record = next((record for record in records if record["rung"] == 1), {})
    base, of_suites = first.get("evaluation"), first.get("suites", {})
    result = []
    for record in records:
        found = record["evaluation"]
        suites = {
            label: {**suite, "delta": _suite_change(of_suites.get(label), suite)}
            for label, suite in record["suites"].items()
        }
        below = of.get(record["input"])
        changes = {"delta": base and _change(base, found), "gain": below and _change(below, found)}
        result.append({**record, **changes, "suites": suites})
    return result


def _change(old: Record, new: Record) -> dict[str, float]:
    """Of an evaluation, from one object to another."""
    changes = {
        "bits_per_byte": new["texts"]["bits_per_byte"] - old["texts"]["bits_per_byte"],
        "accuracy": new["questions"]["accuracy"] - old["questions"]["accuracy"],
    }
    before, after = old.get("conversations"), new.get("conversations")
    return changes | ({"conversations": after["accuracy"] - before["accuracy"]} if before and after else {})


def _suite_change(old: Record | None, new: Record) -> float | None:
    return new["value"] - old["value"] if old and old.get("form") == new.get("form") else None


def total_time(records: Sequence[Record]) -> dict[str, float]:
    """Seconds and processor seconds of all jobs and evaluations on record."""
    return _sum([record["job_time"] for record in records] + [part for record in records for part in _asking(record)])


def _asking(record: Record) -> list[dict[str, float]]:
    """The times of an object's evaluation and suites."""
    suites = [suite["time"] for suite in record.get("suites", {}).values()]
    return [record["evaluation_time"], *suites] if "evaluation_time" in record else []


def _sum(times: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: round(sum(time[name] for time in times), 1) for name in ("seconds", "processor_seconds")}


def suites_of(evaluated: Sequence[Record]) -> dict[str, str]:
    """The suites that objects were asked, in their order: label -> the number that it is known by."""
    return {label: suite["number"] for record in evaluated for label, suite in record["suites"].items()}


def _title(label: str, number: str) -> str:
    name = "CORE-8" if label == "core8" and number == "core8_centered_mean" else label
    return f"{name}, {_TITLES.get(number, number)}"


def table(evaluated: Sequence[Record], fed: Sequence[Record], time: dict[str, float]) -> str:
    """The ladder as a Markdown table, and what it took."""
    suites = suites_of(evaluated)
    of_suites = [heading for label, number in suites.items() for heading in (_title(label, number), _DELTA)]
    of_conversations = _CONVERSATIONS if any(map(_conversations, evaluated)) else ()
    headings = (*_BEFORE, *of_conversations, *of_suites, *_AFTER)
    cells = [_cells(record, list(suites), bool(of_conversations)) for record in evaluated]
    lines = [markdown_table(headings, cells)]
    lines += [
        "",
        *pinned_lines(evaluated),
        f"In all {time['seconds']:,.0f} s, {time['processor_seconds']:,.0f} s of processor time.",
    ]
    for record in fed:
        lines.append(
            f"No rung: `{record['object']}` ({_job(record)}, {_validation(record)}, {_time(record['job_time'])})."
        )
    return "\n".join(lines)


def pinned_lines(evaluated: Sequence[Record]) -> list[str]:
    """How many pinned answers changed from each object to the next, or why that is not counted."""
    lines = []
    for record, (label, suite) in ((one, item) for one in evaluated for item in one["suites"].items()):
        if not (found := suite.get("pinned")):
            continue
        by = " by character, as the vocabularies differ" if found["unit"] == "character" else ""
        told = f"{found['changed']} of {found['compared']} other than those of `{record['input']}`{by}"
        if not found["asked_alike"]:
            told = f"not compared with those of `{record['input']}`, which was asked otherwise (form or messages)"
        lines.append(f"- {label}, pinned answers of `{record['object']}`: {told}")
    return [*lines, ""] if lines else []


def _cells(record: Record, labels: Sequence[str], with_conversations: bool) -> list[str]:
    texts, questions, delta = record["evaluation"]["texts"], record["evaluation"]["questions"], record["delta"]
    return [
        str(record["rung"]),
        f"`{record['object']}`",
        _job(record),
        f"{texts['nats_per_token']:.4f}",
        f"{texts['bits_per_byte']:.4f}",
        f"{delta['bits_per_byte']:+.4f}" if delta else "",
        _share(questions),
        f"{100 * delta['accuracy']:+.1f}" if delta else "",
        *(_of_conversations(record) if with_conversations else ()),
        *(cell for label in labels for cell in _of_suite(record["suites"].get(label))),
        _validation(record),
        _time(record["job_time"]),
        _time(_sum(_asking(record))),
        f"`{record['weights_sha256'][:12]}`",
    ]


def _job(record: Record) -> str:
    """The job, and of a training what it minimised."""
    training = record.get("training")
    return f"{record['job']}, {training['objective']}" if training and "objective" in training else record["job"]


def _share(answered: Record) -> str:
    return f"{100 * answered['accuracy']:.1f} % ({answered['exact']}/{answered['n']})"


def _conversations(record: Record) -> Record | None:
    """What the questions came to as conversations, where they were asked so."""
    return record["evaluation"].get("conversations")


def _of_conversations(record: Record) -> tuple[str, str]:
    found, gain = _conversations(record), (record["gain"] or {}).get("conversations")
    if found is None:
        return "", ""
    return f"{_share(found)}, {found['valid']} valid", "" if gain is None else f"{100 * gain:+.1f}"


def _of_suite(suite: dict[str, Any] | None) -> tuple[str, str]:
    if suite is None:
        return "", ""
    return f"{suite['value']:.4f}", "" if suite["delta"] is None else f"{suite['delta']:+.4f}"


def _validation(record: Record) -> str:
    """Of every dataset that was validated on, named where there are several; of sampled answers the rewards."""
    found = (record.get("validation") or {}).items()
    losses = {
        tag.removeprefix("valid").removesuffix("loss/total").strip("/"): pair
        for tag, pair in found
        if tag.endswith("/loss/total") or tag.startswith("valid/reward/")
    }
    return ", ".join(f"{name} {pair['before']:.4f} → {pair['after']:.4f}".strip() for name, pair in losses.items())


def _time(time: dict[str, float]) -> str:
    return f"{time['seconds']:.0f} ({time['processor_seconds']:.0f})"


def plot(evaluated: Sequence[Record], output: Path) -> None:
    """Bits per byte, accuracy and suites along the ladder, into a PNG which appears whole or not at all."""
    pyplot = plotting()

    suites = suites_of(evaluated)
    count = 2 + len(suites)
    figure, (losses, answers, *others) = pyplot.subplots(1, count, figsize=(6.5 * count, 5), layout="constrained")
    figure.suptitle("The ladder: conversions, and what was trained behind them")
    loss = [record["evaluation"]["texts"]["bits_per_byte"] for record in evaluated]
    share = [100 * record["evaluation"]["questions"]["accuracy"] for record in evaluated]
    _along(losses, evaluated, loss)
    losses.set(title="held-out texts", ylabel="bits per byte", ylim=(0, 1.1 * max(loss)))
    _along(answers, evaluated, share)
    found = [100 * one["accuracy"] if (one := _conversations(record)) else math.nan for record in evaluated]
    if not all(map(math.isnan, found)):
        _along(answers, evaluated, found, style=":", label="as conversations")
    asked = evaluated[0]["evaluation"]["questions"]["n"]
    answers.set(title=f"held-out questions, greedy (n = {asked})", ylabel="exact, %", ylim=(0, 105))
    for axis, (label, number) in zip(others, suites.items(), strict=True):
        found = [record["suites"][label]["value"] if label in record["suites"] else math.nan for record in evaluated]
        _along(axis, evaluated, found)
        axis.set(title=_title(label, number), ylabel=_TITLES.get(number, number))
    save_figure(figure, output, dpi=110)


def _along(
    axes: Axes, evaluated: Sequence[Record], values: Sequence[float], *, style: str = "-", label: str | None = None
) -> None:
    places = range(len(evaluated))
    axes.plot(places, values, color="0.75", linewidth=1.2, zorder=1, linestyle=style, label=label)
    made = [_job(record) if record["training"] else "converted" for record in evaluated]
    for number, how in enumerate(dict.fromkeys(made)):
        chosen = [place for place in places if made[place] == how]
        face, edge = ("white", "tab:blue") if how == "converted" else (f"C{number - 1}",) * 2
        name = None if label else how
        axes.scatter(chosen, [values[place] for place in chosen], s=36, c=face, edgecolors=edge, label=name)
    for place, value in zip(places, values, strict=True):
        if math.isnan(value):  # not asked of this one
            continue
        where = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        axes.annotate(f"{value:.3g}", (place, value), fontsize=7, **where)
    names = [f"{record['rung']}: {record['object']}" for record in evaluated]
    axes.set_xticks(list(places), names, rotation=40, ha="right", fontsize=7)
    axes.legend(frameon=False, fontsize=8)
