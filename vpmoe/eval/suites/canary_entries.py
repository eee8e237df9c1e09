"""What a report of the canaries says of generated answers: right or not, in which form, how long, how repetitive."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from statistics import mean, median
from typing import Any

from vpmoe.eval.asking import Form
from vpmoe.eval.display import spell
from vpmoe.eval.scoring import Scored
from vpmoe.eval.suites import suite_report
from vpmoe.eval.suites.pinned import lines_of

_GRAM = 4  # tokens

Record = dict[str, Any]


def record_of(task: str, one: Scored, form: Form, right: bool | None) -> Record:
    """A line of the items' file; ``right`` is None where there is no right answer."""
    question = one.question
    level = question.level if question.family == task else question.family
    told = {"task": task, "item": question.row["synth_id"], "level": level}
    told |= {} if right is None else {"correct": right}
    return {**told, "answer": one.judgement.final, **_texture(one, form)}


def output_of(one: Scored, form: Form) -> Record:
    """An answer as :class:`vpmoe.eval.suites.pinned.Output` has it, and what it is like."""
    text = spell(one.ids, form.tokenizer)
    return {"prompt": one.question.query, "ids": list(one.ids), "text": text, **_texture(one, form)}


def _texture(one: Scored, form: Form) -> Record:
    return {
        "valid": one.judgement.valid,
        "fault": one.judgement.reason,
        "tokens": len(one.ids),
        "ended": one.ids[-1] in form.stop_ids,
        "repetition": repetition(one.ids),
    }


def repetition(ids: Sequence[int]) -> float:
    """Share of 4-grams of tokens that occurred before in the same text (Welleck et al. 2020, seq-rep-4); 0 of fewer."""
    grams = [tuple(ids[at : at + _GRAM]) for at in range(len(ids) - _GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def entries_of(records: Sequence[Record], max_new_tokens: int) -> dict[str, dict[str, Any]]:
    """Each task's numbers: accuracy and validity with their intervals, by level too, and what the answers are like.

    Args:
        records: as :func:`record_of` gives them; of texts that are only read ``task``, ``item`` and ``correct``.
        max_new_tokens: an answer that is shorter and did not end was cut by the context.
    """
    entries = {}
    for name, some in _grouped(records, "task").items():
        cut = sum(not one["ended"] and one["tokens"] < max_new_tokens for one in some if "ended" in one)
        entries[name] = {**_shares(some), "cut": cut, **(_answers_entry(some) if "ended" in some[0] else {})}
    return entries


def _grouped(records: Iterable[Record], field: str) -> dict[str, list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record[field], []).append(record)
    return groups


def _shares(records: Sequence[Record]) -> dict[str, Any]:
    """Accuracy where there are right answers, validity where there are any."""
    n, found = len(records), {"n": len(records)}
    if "correct" in records[0]:
        found |= suite_report.shares(sum(record["correct"] for record in records), n)
    if "valid" in records[0]:
        valid = sum(record["valid"] for record in records)
        found |= {"validity": valid / n, "validity_interval": suite_report.wilson(valid, n)}
    return found


def _answers_entry(records: Sequence[Record]) -> dict[str, Any]:
    tokens = [record["tokens"] for record in records]
    faults = Counter(record["fault"] for record in records if record["fault"] is not None)
    return {
        **{name: float(mean(record[name] for record in records)) for name in ("ended", "repetition")},
        "mean_tokens": float(mean(tokens)),
        "tokens": {"median": median(tokens), "most": max(tokens)},
        "faults": dict(faults.most_common()),
        "levels": {level: _shares(some) for level, some in _grouped(records, "level").items()},
    }


def summary_lines(report: Mapping[str, Any]) -> str:
    """The report as a few lines."""
    lines = []
    for name, entry in report["tasks"].items():
        known, bounds = ("accuracy", "interval") if "accuracy" in entry else ("validity", "validity_interval")
        low, high = entry[bounds]
        line = f"{name:<24}{entry[known]:.4f} [{low:.3f}, {high:.3f}], n {entry['n']}"
        if "ended" in entry:
            shown = {"valid": entry["validity"], "ended": entry["ended"], "repetition": entry["repetition"]}
            told = ", ".join(f"{label} {share:.3f}" for label, share in shown.items())
            line += f"; {told}, {entry['mean_tokens']:.0f} tokens"
        lines.append(line)
    lines += [f"{name:<24}left out: {reason}" for name, reason in report["left_out"].items()]
    if "against" in report:
        lines += lines_of(report["against"])
    return "\n".join([*lines, f"{report['checkpoint']['run']}, {report['wall_seconds']:.1f} s"])
