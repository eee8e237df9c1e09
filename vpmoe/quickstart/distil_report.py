"""The result of ``vpmoe distil-nano``: report, table and curves, held against the targets seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median, stdev
from typing import TYPE_CHECKING, Any

from vpmoe.eval.plots import read_curves
from vpmoe.eval.reports import markdown_table
from vpmoe.eval.valid_split import TOP_K
from vpmoe.quickstart.distil import AFTER
from vpmoe.quickstart.proof import answers, curve, evaluation, percent
from vpmoe.quickstart.report import held
from vpmoe.quickstart.settings import DistilTargets
from vpmoe.quickstart.trained import TrainedRun
from vpmoe.steps import plotting, save_figure

if TYPE_CHECKING:
    from vpmoe.quickstart.distil import Students, Teaching

_LAST = 5
"""Steps whose mean is the gap in the end: one step has a few thousand sampled tokens."""


def write_distil_report(
    teaching: Teaching, classes: Sequence[Students], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Write and print the report; see ``Proof.report``.

    Args:
        teaching: the teacher, trained and evaluated.
        classes: of each seed, all of whose runs are done.
        seconds: spent on what was made, by name, over all seeds.
    """
    whole, families = answers(teaching.run)
    teacher = {"exact": whole["accuracy"], "families": {name: one["accuracy"] for name, one in families.items()}}
    seeds = [
        {"seed": each.seed, "students": {name: _measured(name, run) for name, run in each.runs.items()}}
        for each in classes
    ]
    found = {
        "teacher": teacher,
        # Medians of the seeds, which follow one by one.
        "students": {
            name: {of: median(one["students"][name][of] for one in seeds) for of in first}
            for name, first in seeds[0]["students"].items()
        },
        "gains": gains(seeds),
        "seeds": seeds,
        "targets": held_against(teaching.proof.settings.targets, teacher, seeds),
    }
    runs = {"teacher": teaching.run, "start": classes[0].start, **classes[0].runs}
    lines = f"teacher: {percent(teacher['exact'])} exact\n\n{table(seeds)}"
    return teaching.proof.report(runs, seconds, found, lines, lambda output: plot(classes, seeds, teacher, output))


def held_against(
    targets: DistilTargets, teacher: Mapping[str, Any], seeds: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Each target with what was measured, and whether all are met."""
    measured = {"teacher: exact answers": (targets.teacher_exact, teacher["exact"])}
    for one in seeds:
        ce, stored, policy = (one["students"][name] for name in ("ce", "stored_topk", "on_policy"))
        of_seed = {
            "exact answers, stored top K above CE": (targets.stored_over_ce_exact, stored["exact"] - ce["exact"]),
            "KL to the teacher, saved by stored top K": (
                targets.stored_over_ce_kl,
                1 - stored["kl_to_teacher"] / ce["kl_to_teacher"],
            ),
            f"share of that KL that K = {TOP_K} sees": (
                targets.top_k_share_of_kl,
                stored["kl_top_k"] / stored["kl_to_teacher"],
            ),
            "exact answers gained on-policy": (targets.on_policy_exact_gain, policy["exact"] - stored["exact"]),
            "gap closed on-policy": (targets.on_policy_gap_fall, 1 - policy["gap_after"] / policy["gap_before"]),
        }
        measured |= {f"seed {one['seed']}: {name}": entry for name, entry in of_seed.items()}
    return held(measured)


def gains(seeds: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]] | None:
    """What stored top K has over CE; None of one seed.

    Both begin with a seed's weights and read its tokens, so that their difference is what compares: ``each`` seed's,
    their ``mean`` and ``deviation`` (standard, of a sample), and whether the mean is ``beyond`` twice that.
    """
    if len(seeds) < 2:
        return None
    found = {}
    for of, sign in (("exact", 1), ("kl_to_teacher", -1)):
        each = [sign * (one["students"]["stored_topk"][of] - one["students"]["ce"][of]) for one in seeds]
        values = {"each": each, "mean": mean(each), "deviation": stdev(each)}
        found[of] = {**values, "beyond": values["mean"] > 2 * values["deviation"]}
    return found


def table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """A row a student of each seed, in Markdown."""
    headings = ("seed", "student", "exact", "valid Harmony", "KL to the teacher", f"of K = {TOP_K}", "steps", "tokens")
    rows = []
    for one in seeds:
        for name, student in one["students"].items():
            gap = [f"{student[of]:.4f}" if of in student else "" for of in ("gap_before", "gap_after")]
            shares = (percent(student["exact"]), percent(student["valid"]))
            distance = (f"{student['kl_to_teacher']:.4f}", f"{student['kl_top_k']:.4f}")
            rows.append(
                [str(one["seed"]), name, *shares, *distance, str(student["steps"]), f"{student['tokens']:,}", *gap]
            )
    return markdown_table((*headings, "gap before", "after"), rows)


def plot(
    classes: Sequence[Students], seeds: Sequence[Mapping[str, Any]], teacher: Mapping[str, Any], output: Path
) -> None:
    """KD while training, the gap on-policy, and every student's exact answers against its KL, into a PNG."""
    pyplot = plotting()

    figure, (stored, policy, students) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    figure.suptitle("One student, the same tokens: texts alone, a teacher's top K, its own words")
    colours = {name: f"C{place}" for place, name in enumerate(AFTER)}
    for each in classes:
        for before, name in AFTER.items():
            style: dict[str, Any] = {"color": colours[before], "alpha": 0.8}
            first = each is classes[0]
            curve(stored, read_curves(each.runs[before].metrics), "kd/analysis", before if first else "", **style)
            if before in each.after:
                curve(policy, read_curves(each.runs[name].metrics), "gap/total", name if first else "", **style)
    stored.set(title="KL to the teacher, analysis", xlabel="step", ylabel="nats a token", yscale="log")
    policy.set(title="on-policy: log p student - log p teacher", xlabel="step", ylabel="nats a sampled token")
    for one in seeds:
        for before, name in AFTER.items():
            pair = [one["students"][of] for of in (before, name) if of in one["students"]]
            heights, places = [100 * of["exact"] for of in pair], [of["kl_to_teacher"] for of in pair]
            label = f"{before}{', then on-policy' * (len(pair) > 1)}" if one is seeds[0] else ""
            students.plot(places, heights, color=colours[before], marker="o", markevery=[0], label=label)
            students.plot(places[1:], heights[1:], color=colours[before], marker=">")
    students.axhline(100 * teacher["exact"], color="grey", linewidth=0.8, label="teacher")
    students.set(title="held-out questions, greedy", xlabel="KL to the teacher", ylabel="exact, %", ylim=(0, 102))
    for axes in (stored, policy, students):
        axes.legend(frameon=False, fontsize=7)
    save_figure(figure, output, dpi=110)


def _measured(name: str, run: TrainedRun) -> dict[str, Any]:
    (whole, _), distance, curves = answers(run), evaluation(run)["to_teacher"], read_curves(run.metrics)
    tokens = curves["tokens/real"]
    found: dict[str, Any] = {
        "exact": whole["accuracy"],
        "valid": whole["validity"],
        "kl_to_teacher": distance["kl"],
        "kl_top_k": distance[f"kl_top_{TOP_K}"],
        "steps": len(tokens),
        "tokens": round(sum(value for _, value in tokens)),
    }
    if name in AFTER.values():
        gap = [value for _, value in curves["gap/total"]]
        found |= {"gap_before": gap[0], "gap_after": mean(gap[-_LAST:])}
    return found
