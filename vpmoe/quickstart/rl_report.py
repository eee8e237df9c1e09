"""The result of ``vpmoe rl-nano``: report, table and curves, held against the targets seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.config import config_hash
from megatron_vpmoe.files import write_atomically
from megatron_vpmoe.software import git_state
from vpmoe.eval.plots import Curves, read_curves
from vpmoe.eval.reports import check_reportable, markdown_table, read_report, write_report
from vpmoe.eval.suites.suite_report import ALL
from vpmoe.eval.suites.suite_report import KIND as EVALUATION_KIND
from vpmoe.quickstart.environment import describe
from vpmoe.quickstart.settings import RlTargets
from vpmoe.quickstart.trained import TrainedRun
from vpmoe.steps import read_receipt, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from vpmoe.quickstart.rl import RlPlan, SeedPlan

SCHEMA_VERSION = 1
KIND = "rl_nano"
_GRPO = ("exact_before", "exact_after", "valid_before", "valid_after")
_DPO = ("pair_accuracy", "pair_accuracy_policy", "pair_accuracy_policy_before", "exact_after", "valid_after")


def write_rl_report(plan: RlPlan, seconds: Mapping[str, float]) -> dict[str, Any]:
    """Write ``report.json``, ``report.md`` and ``report.png`` to the plan's report folder, print the table.

    Args:
        plan: all of whose steps are done.
        seconds: spent on what was made, by name, over all seeds.
    """
    measured = [_of_seed(one) for one in plan.seeds]
    report = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "settings": plan.settings.model_dump(),
        "config_hashes": {name: config_hash(getattr(plan.seeds[0], name).cfg) for name in ("sft", "grpo", "dpo")},
        "git": git_state(plan.data.root),
        "environment": describe(),
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        # Medians of the seeds, which follow one by one.
        "grpo": {name: median(one["grpo"][name] for one in measured) for name in _GRPO},
        "dpo": {name: median(one["dpo"][name] for one in measured) for name in _DPO},
        "seeds": measured,
        "targets": held_against(plan.settings.targets, measured),
    }
    folder = plan.report_folder
    check_reportable(folder / "report.json", KIND)
    folder.mkdir(parents=True, exist_ok=True)
    lines = table(report)
    plot(plan.seeds, report, folder / "report.png")
    write_atomically(folder / "report.md", (lines + "\n").encode())
    # The report comes last: where there is one, there are the others.
    write_report(folder / "report.json", report)
    print(f"\n{lines}\n\nreport: {folder / 'report.json'}, table and picture beside it", flush=True)
    return report


def held_against(targets: RlTargets, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each target with what was measured of each seed, and whether all are met."""
    entries = {}
    for one in seeds:
        grpo, dpo = one["grpo"], one["dpo"]
        measured = {
            "gain of exact answers by GRPO": (targets.exact_gain, grpo["exact_after"] - grpo["exact_before"]),
            "change of validity by GRPO": (targets.validity_change, grpo["valid_after"] - grpo["valid_before"]),
            "pair accuracy by DPO": (targets.pair_accuracy, dpo["pair_accuracy"]),
        }
        for name, (target, value) in measured.items():
            entries[f"seed {one['seed']}: {name}"] = {"target": target, "measured": value, "met": value >= target}
    return {"met": all(entry["met"] for entry in entries.values()), "entries": entries}


def table(report: Mapping[str, Any]) -> str:
    """A row a seed, in Markdown."""
    headings = ("seed", "exact, SFT", "GRPO", "DPO", "valid Harmony, SFT", "GRPO", "DPO")
    headings += ("held-out pairs", "right relative to SFT", "right by itself, SFT", "DPO")
    rows = []
    for one in report["seeds"]:
        grpo, dpo = one["grpo"], one["dpo"]
        shares = [grpo["exact_before"], grpo["exact_after"], dpo["exact_after"]]
        shares += [grpo["valid_before"], grpo["valid_after"], dpo["valid_after"]]
        of_pairs = [dpo["pair_accuracy"], dpo["pair_accuracy_policy_before"], dpo["pair_accuracy_policy"]]
        rows.append([str(one["seed"]), *map(_percent, shares), str(dpo["pairs"]), *map(_percent, of_pairs)])
    return markdown_table(headings, rows)


def plot(seeds: Sequence[SeedPlan], report: Mapping[str, Any], output: Path) -> None:
    """Rewards while sampling, exact answers to held-out questions before and after, and held-out pairs, into a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (rewards, answers, pairs) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    figure.suptitle("From a model short of mastery: rewards (GRPO) and preferences (DPO)")
    for one in seeds:
        grpo, dpo = (read_curves(_metrics(run)) for run in (one.grpo, one.dpo))
        _curve(rewards, grpo, "rollout/reward/exact", f"exact, seed {one.seed}")
        _curve(rewards, grpo, "policy/entropy", f"entropy (nats), seed {one.seed}", linestyle=":")
        _curve(pairs, dpo, "valid/accuracy/relative", f"relative to SFT, seed {one.seed}")
        _curve(pairs, dpo, "valid/accuracy/policy", f"by itself, seed {one.seed}", linestyle=":")
    rewards.set(title="GRPO: sampled answers to training questions", xlabel="step", ylim=(0, 1))
    pairs.set(title="DPO: held-out pairs ordered rightly", xlabel="step", ylim=(0, 1.02))
    for one in report["seeds"]:
        grpo, dpo = one["grpo"], one["dpo"]
        heights = [100 * value for value in (grpo["exact_before"], grpo["exact_after"], dpo["exact_after"])]
        answers.plot(range(3), heights, marker="o", label=f"seed {one['seed']}")
    answers.set_xticks(range(3), ["SFT", "GRPO", "DPO"])
    answers.set(title="held-out questions, greedy", ylabel="exact, %", ylim=(0, 102))
    for axes in (rewards, answers, pairs):
        axes.legend(frameon=False, fontsize=7)
    save_figure(figure, output, dpi=110)


def _curve(axes: Axes, curves: Curves, tag: str, label: str, **style: Any) -> None:
    if points := curves.get(tag):
        axes.plot(*zip(*points, strict=True), label=label, linewidth=1.2, **style)


def _of_seed(plan: SeedPlan) -> dict[str, Any]:
    (sft, before), (grpo, after), (dpo, _) = (_answers(run) for run in (plan.sft, plan.grpo, plan.dpo))
    valid = {tag: points for tag, points in read_curves(_metrics(plan.dpo)).items() if tag.startswith("valid/")}
    relative, policy = valid["valid/accuracy/relative"], valid["valid/accuracy/policy"]
    rows = read_receipt(plan.dpo.work / plan.dpo.dataset)["report"]["splits"]["valid"]["rows"]
    return {
        "seed": plan.seed,
        "grpo": {
            "exact_before": sft["accuracy"],
            "exact_after": grpo["accuracy"],
            "valid_before": sft["validity"],
            "valid_after": grpo["validity"],
            "families": {name: entry["accuracy"] for name, entry in after.items()},
            "families_before": {name: entry["accuracy"] for name, entry in before.items()},
        },
        "dpo": {
            "pair_accuracy": relative[-1][1],
            "pair_accuracy_policy": policy[-1][1],
            "pair_accuracy_policy_before": policy[0][1],
            "pairs": rows // 2,
            "exact_after": dpo["accuracy"],
            "valid_after": dpo["validity"],
        },
    }


def _answers(run: TrainedRun) -> tuple[dict[str, Any], dict[str, Any]]:
    """The entry of all held-out questions, and those of the families."""
    tasks = dict(read_report(run.work / run.evaluation, EVALUATION_KIND)["tasks"])
    return tasks.pop(ALL), tasks


def _metrics(run: TrainedRun) -> Path:
    return run.work / run.run / "metrics.jsonl"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
