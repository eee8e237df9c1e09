"""The result of ``vpmoe nano-moe``: report, table and curves, held against the targets seed by seed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.config import parameter_count
from vpmoe.eval.plots import read_curves
from vpmoe.eval.reports import markdown_table, read_report
from vpmoe.eval.suites.stories import BANNED, PROTAGONIST, REQUIRED, STORY
from vpmoe.eval.suites.suite_report import ALL
from vpmoe.eval.suites.suite_report import KIND as EVALUATION_KIND
from vpmoe.quickstart.proof import curve, evaluation, percent
from vpmoe.quickstart.report import held
from vpmoe.quickstart.settings import StoryTargets
from vpmoe.steps import plotting, save_figure

if TYPE_CHECKING:
    from vpmoe.quickstart.proof import Proof
    from vpmoe.quickstart.settings import StorySettings
    from vpmoe.quickstart.stories import StoryRuns

_STAGES = {"pretrain": "pretrained", "sft": "sft", "dpo": "dpo"}
"""Of a training, the name of its model in the report."""


def write_stories_report(
    proof: Proof[StorySettings], classes: Sequence[StoryRuns], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Write and print the report; see ``Proof.report``.

    Args:
        proof: what was asked for.
        classes: of each seed, all of whose steps are done.
        seconds: spent on what was made, by name, over all seeds.
    """
    measured = [_measured(runs) for runs in classes]
    count = parameter_count(classes[0].pretrain.cfg)

    def middle(name: str) -> dict[str, float]:
        return {stage: median(one[name][stage] for one in measured) for stage in _STAGES.values()}

    found = {
        "parameters": count.total,
        "active_parameters": count.active,
        # Medians of the seeds, which follow one by one; banned words are those of the last model.
        "perplexity": median(one["perplexity"] for one in measured),
        "required_words": middle("required_words"),
        "protagonist": middle("protagonist"),
        "banned_words": middle("banned_words")["dpo"],
        "seeds": measured,
        "targets": held_against(proof.settings.targets, measured),
    }
    lines = f"{count.total:,} parameters, a token uses {count.active:,}\n\n{table(measured)}"
    return proof.report(classes[0].parts, seconds, found, lines, lambda output: plot(classes, measured, output))


def held_against(targets: StoryTargets, seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Each target with what was measured of each seed, and whether all are met."""
    least, most = {}, {}
    for one in seeds:
        words, hero, seed = one["required_words"], one["protagonist"], f"seed {one['seed']}"
        most[f"{seed}: perplexity"] = (targets.perplexity, one["perplexity"])
        least[f"{seed}: required words after SFT"] = (targets.required_words, words["sft"])
        gained = words["sft"] - words["pretrained"]
        least[f"{seed}: required words gained by SFT"] = (targets.required_words_gain, gained)
        least[f"{seed}: protagonist gained by DPO"] = (targets.protagonist_gain, hero["dpo"] - hero["sft"])
        most[f"{seed}: banned words after DPO"] = (targets.banned_words, one["banned_words"]["dpo"])
    return held(least, most)


def table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """A row a model of each seed, in Markdown; in brackets what its stories give against another prompt."""
    headings = ("seed", "model", "perplexity", "required words", "protagonist", "banned words", "ended", "tokens")
    rows = []
    for one in seeds:
        for stage in _STAGES.values():
            shares = [
                f"{percent(one[name][stage])} ({percent(one['by_chance'][name][stage])})"
                for name in ("required_words", "protagonist", "banned_words")
            ]
            shares.append(percent(one["ended"][stage]))
            perplexity = f"{one['perplexity']:.2f}" if stage == "pretrained" else ""
            rows.append([str(one["seed"]), stage, perplexity, *shares, f"{one['tokens'][stage]:,}"])
    return markdown_table(headings, rows)


def plot(classes: Sequence[StoryRuns], seeds: Sequence[Mapping[str, Any]], output: Path) -> None:
    """Losses of pretraining and SFT, held-out pairs, and what the stories keep to, into a PNG."""
    pyplot = plotting()

    figure, (pretraining, tuning, pairs, kept) = pyplot.subplots(1, 4, figsize=(19, 4.2), layout="constrained")
    figure.suptitle("A story model from nothing: pretraining, stories to order (SFT), the right protagonist (DPO)")
    for runs in classes:
        for axes, run in ((pretraining, runs.pretrain), (tuning, runs.sft)):
            curves, label = read_curves(run.metrics), f"seed {runs.seed}"
            (line,) = axes.plot(*zip(*curves["loss/total"], strict=True), linewidth=0.8, alpha=0.5, label=label)
            curve(axes, curves, "valid/loss/total", f"held out, {label}", color=line.get_color(), marker="o")
        dpo = read_curves(runs.dpo.metrics)
        curve(pairs, dpo, "valid/accuracy/relative", f"relative to SFT, seed {runs.seed}")
        curve(pairs, dpo, "valid/accuracy/policy", f"by itself, seed {runs.seed}", linestyle=":")
    pretraining.set(title="pretraining", xlabel="step", ylabel="nats a token")
    tuning.set(title="SFT: stories to order", xlabel="step", ylabel="nats a token")
    pairs.set(title="DPO: held-out pairs ordered rightly", xlabel="step", ylim=(0, 1.02))
    for one in seeds:
        for place, name in enumerate(("required_words", "protagonist", "banned_words")):
            heights = [100 * one[name][stage] for stage in _STAGES.values()]
            label = name.replace("_", " ") if one is seeds[0] else ""
            kept.plot(range(3), heights, marker="o", color=f"C{place}", label=label)
    kept.set_xticks(range(3), _STAGES.values())
    kept.set(title="stories to held-out prompts", ylabel="%", ylim=(0, 102))
    for axes in (pretraining, tuning, pairs, kept):
        axes.legend(frameon=False, fontsize=7)
    save_figure(figure, output, dpi=110)


def _measured(runs: StoryRuns) -> dict[str, Any]:
    stages = {stage: evaluation(runs.parts[part])["tasks"] for part, stage in _STAGES.items()}

    def shares(task: str, of: str = "accuracy") -> dict[str, float]:
        return {stage: tasks[task][of] for stage, tasks in stages.items()}

    def kept(of: str = "accuracy") -> dict[str, dict[str, float]]:
        banned = {stage: 1 - share for stage, share in shares(BANNED, of).items()}
        return {"required_words": shares(REQUIRED, of), "protagonist": shares(PROTAGONIST, of), "banned_words": banned}

    text = read_report(runs.pretrain.work / runs.likelihood, EVALUATION_KIND)["tasks"]
    tokens = {stage: read_curves(runs.parts[part].metrics)["elapsed/tokens"] for part, stage in _STAGES.items()}
    return {
        "seed": runs.seed,
        "perplexity": text[ALL]["perplexity"],
        **kept(),
        "by_chance": kept("by_chance"),  # the same stories against the constraints of another prompt
        "ended": shares(STORY, "validity"),
        "tokens": {stage: round(points[-1][1]) for stage, points in tokens.items()},
    }
