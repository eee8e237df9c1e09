"""The result of ``vpmoe rl-nano``: report, table and curves, held against the targets seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from vpmoe.eval.plots import read_curves
from vpmoe.eval.reports import markdown_table
from vpmoe.quickstart.proof import answers, curve, percent
from vpmoe.quickstart.report import held
from vpmoe.quickstart.settings import RlTargets
from vpmoe.steps import plotting, read_receipt, save_figure

if TYPE_CHECKING:
    from vpmoe.quickstart.proof import QuestionProof
    from vpmoe.quickstart.rl import SeedPlan
    from vpmoe.quickstart.settings import RlSettings

_GRPO = ("exact_before", "exact_after", "valid_before", "valid_after")
_DPO = ("pair_accuracy", "pair_accuracy_policy", "pair_accuracy_policy_before", "exact_after", "valid_after")


def write_rl_report(
    proof: QuestionProof[RlSettings], plans: Sequence[SeedPlan], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Write and print the report; see ``Proof.report``.

    Args:
        plans: of each seed, all of whose steps are done.
        seconds: spent on what was made, by name, over all seeds.
    """
    measured = [_of_seed(one) for one in plans]
    found = {
        # Medians of the seeds, which follow one by one.
        "grpo": {name: median(one["grpo"][name] for one in measured) for name in _GRPO},
        "dpo": {name: median(one["dpo"][name] for one in measured) for name in _DPO},
        "seeds": measured,
        "targets": held_against(proof.settings.targets, measured),
    }
    runs = {"sft": plans[0].sft, "grpo": plans[0].grpo, "dpo": plans[0].dpo}
    return proof.report(runs, seconds, found, table(measured), lambda output: plot(plans, measured, output))


def held_against(targets: RlTargets, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each target with what was measured of each seed, and whether all are met."""
    measured = {}
    for one in seeds:
        grpo, dpo = one["grpo"], one["dpo"]
        of_seed = {
            "gain of exact answers by GRPO": (targets.exact_gain, grpo["exact_after"] - grpo["exact_before"]),
            "change of validity by GRPO": (targets.validity_change, grpo["valid_after"] - grpo["valid_before"]),
            "pair accuracy by DPO": (targets.pair_accuracy, dpo["pair_accuracy"]),
        }
        measured |= {f"seed {one['seed']}: {name}": entry for name, entry in of_seed.items()}
    return held(measured)


def table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """A row a seed, in Markdown."""
    headings = ("seed", "exact, SFT", "GRPO", "DPO", "valid Harmony, SFT", "GRPO", "DPO")
    headings += ("held-out pairs", "right relative to SFT", "right by itself, SFT", "DPO")
    rows = []
    for one in seeds:
        grpo, dpo = one["grpo"], one["dpo"]
        shares = [grpo["exact_before"], grpo["exact_after"], dpo["exact_after"]]
        shares += [grpo["valid_before"], grpo["valid_after"], dpo["valid_after"]]
        of_pairs = [dpo["pair_accuracy"], dpo["pair_accuracy_policy_before"], dpo["pair_accuracy_policy"]]
        rows.append([str(one["seed"]), *map(percent, shares), str(dpo["pairs"]), *map(percent, of_pairs)])
    return markdown_table(headings, rows)


def plot(plans: Sequence[SeedPlan], seeds: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Rewards while sampling, exact answers to held-out questions before and after, and held-out pairs, into a PNG."""
    pyplot = plotting()

    figure, (rewards, answers, pairs) = pyplot.subplots(1, 3, figsize=(15, 4.2), layout="constrained")
    figure.suptitle("From a model short of mastery: rewards (GRPO) and preferences (DPO)")
    for plan in plans:
        grpo, dpo = (read_curves(run.metrics) for run in (plan.grpo, plan.dpo))
        curve(rewards, grpo, "rollout/reward/exact", f"exact, seed {plan.seed}")
        curve(rewards, grpo, "policy/entropy", f"entropy (nats), seed {plan.seed}", linestyle=":")
        curve(pairs, dpo, "valid/accuracy/relative", f"relative to SFT, seed {plan.seed}")
        curve(pairs, dpo, "valid/accuracy/policy", f"by itself, seed {plan.seed}", linestyle=":")
    rewards.set(title="GRPO: sampled answers to training questions", xlabel="step", ylim=(0, 1))
    pairs.set(title="DPO: held-out pairs ordered rightly", xlabel="step", ylim=(0, 1.02))
    for one in seeds:
        grpo, dpo = one["grpo"], one["dpo"]
        heights = [100 * value for value in (grpo["exact_before"], grpo["exact_after"], dpo["exact_after"])]
        answers.plot(range(3), heights, marker="o", label=f"seed {one['seed']}")
    answers.set_xticks(range(3), ["SFT", "GRPO", "DPO"])
    answers.set(title="held-out questions, greedy", ylabel="exact, %", ylim=(0, 102))
    for axes in (rewards, answers, pairs):
        axes.legend(frameon=False, fontsize=7)
    save_figure(figure, output, dpi=110)


def _of_seed(plan: SeedPlan) -> dict[str, Any]:
    (sft, before), (grpo, after), (dpo, _) = (answers(run) for run in (plan.sft, plan.grpo, plan.dpo))
    valid = {tag: points for tag, points in read_curves(plan.dpo.metrics).items() if tag.startswith("valid/")}
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
