"""The result of ``vpmoe think-nano``: the mixture against each expert alone, routing by domain, what does not help."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean, median
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.config import parameter_count
from vpmoe.eval.plots import Curves, read_curves
from vpmoe.eval.reports import markdown_table
from vpmoe.quickstart.proof import curve, percent
from vpmoe.quickstart.think import LANGUAGE_MODELS
from vpmoe.steps import plotting, save_figure

if TYPE_CHECKING:
    from vpmoe.quickstart.proof import Proof
    from vpmoe.quickstart.settings import ThinkSettings
    from vpmoe.quickstart.think import ThinkRuns

_KINDS = ("transformer", "state_space", "denoiser")
"""Of experts, as the router's metrics call them."""
_NOTHING = 0.001
"""Nats a token that are no gain."""
_EVEN = 0.05
"""A difference between the weights of two domains below which the router is said not to tell them apart."""


def write_think_report(
    proof: Proof[ThinkSettings], classes: Sequence[ThinkRuns], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """Write and print the report; see ``Proof.report``.

    Args:
        proof: what was asked for.
        classes: of each seed, all of whose steps are done.
        seconds: spent on what was made, by name, over all seeds.
    """
    domains = list(proof.settings.domains)
    seeds = [measured(runs, domains) for runs in classes]
    parts = classes[0].parts
    found = {
        "parameters": {name: parameter_count(run.cfg).total for name, run in parts.items()},
        # Medians of the seeds, which follow one by one.
        **middle(seeds),
        "said": said(seeds),
        "seeds": seeds,
    }
    lines = "\n\n".join((table(seeds, domains), routing_table(seeds), "\n".join(f"- {line}" for line in found["said"])))
    told = {name: run.provenance() for name, run in parts.items()}
    return proof.report(parts, seconds, found, lines, lambda output: plot(classes, found, output), told)


def measured(runs: ThinkRuns, domains: Sequence[str]) -> dict[str, Any]:
    """The numbers of one seed, of the last validation of each of its runs."""
    curves = {name: read_curves(run.metrics) for name, run in runs.parts.items()}
    tokens = {name: each["elapsed/tokens"][-1][1] for name, each in curves.items()}
    experts: dict[str, Any] = {}
    for name in LANGUAGE_MODELS:
        alone, loaded = f"{name}_alone", _likelihoods(curves[name], domains, tokens[name])
        experts[name] = _likelihoods(curves[alone], domains, tokens[name] + tokens[alone]) | {"as_loaded": loaded}
    errors = {
        domain: {
            "error": _last(curves["diffuser"], f"valid/{domain}/loss/total"),
            "denoised_error": _last(curves["diffuser"], f"valid/{domain}/denoised/error"),
        }
        for domain in domains
    }
    experts["diffuser"] = {
        **{name: fmean(error[name] for error in errors.values()) for name in ("error", "denoised_error")},
        "tokens": tokens["diffuser"],
        "domains": errors,
    }
    # Each expert of a mixture has read the first of these tokens, and the mixture the second.
    mixtures = {
        name: _likelihoods(curves[name], domains, tokens["transformer"] + tokens[name])
        for name in ("full", "storeless")
    }
    return {
        "seed": runs.seed,
        **mixtures,
        "store": {"with": mixtures["full"]["nats"], "without": mixtures["storeless"]["nats"]},
        "experts": experts,
        "routing": {domain: _routing(curves["full"], f"valid/{domain}/routing") for domain in domains},
    }


def middle(seeds: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of measurements of one shape the medians, without the seeds' numbers."""
    first, *_ = seeds
    return {
        name: middle([one[name] for one in seeds]) if isinstance(value, Mapping) else median(one[name] for one in seeds)
        for name, value in first.items()
        if name != "seed"
    }


def table(seeds: Sequence[Mapping[str, Any]], domains: Sequence[str]) -> str:
    """A row a model of each seed, in Markdown: nats a token, perplexity, and nats by domain."""
    headings = ("seed", "model", "tokens", "nats", "perplexity", *domains)
    rows = []
    for one in seeds:
        models = {"full model": one["full"], "without the store": one["storeless"]}
        for name, alone in one["experts"].items():
            if "nats" in alone:
                models |= {f"{_spelled(name)} alone": alone, f"{_spelled(name)} as loaded": alone["as_loaded"]}
        for name, of in models.items():
            numbers = [f"{of['nats']:.4f}", f"{of['perplexity']:.3f}"]
            numbers += [f"{of['domains'][domain]['nats']:.4f}" for domain in domains]
            rows.append([str(one["seed"]), name, f"{of['tokens']:,.0f}", *numbers])
    return markdown_table(headings, rows)


def routing_table(seeds: Sequence[Mapping[str, Any]]) -> str:
    """A row a domain of each seed, in Markdown: each expert's mean weight and its standard deviation over tokens, the
    entropy, the diffuser's error."""
    of_kinds = [f"{_spelled(kind)}, mean ± std" for kind in _KINDS]
    headings = ("seed", "domain", *of_kinds, "entropy, nats", "error of the diffuser", "after DDIM")
    rows = []
    for one in seeds:
        for domain, weights in one["routing"].items():
            error = one["experts"]["diffuser"]["domains"][domain]
            shares = [f"{percent(weights[kind])} ± {percent(weights['std'][kind])}" for kind in _KINDS]
            numbers = (weights["entropy"], error["error"], error["denoised_error"])
            rows.append([str(one["seed"]), domain, *shares, *(f"{number:.3f}" for number in numbers)])
    return markdown_table(headings, rows)


def said(seeds: Sequence[Mapping[str, Any]]) -> list[str]:
    """What helps and what does not, a sentence each; something helps if it does with every seed."""
    lines = []
    for name in LANGUAGE_MODELS:
        gains = [one["experts"][name]["nats"] - one["full"]["nats"] for one in seeds]
        lines.append(_compared(f"the full model against the {_spelled(name)} alone at equal tokens", gains))
    gains = [one["store"]["without"] - one["store"]["with"] for one in seeds]
    lines.append(_compared("the store against the same model trained without it", gains))
    best = [min(one["experts"][name]["as_loaded"]["nats"] for name in LANGUAGE_MODELS) for one in seeds]
    gains = [nats - one["full"]["nats"] for nats, one in zip(best, seeds, strict=True)]
    lines.append(_compared("mixing against the best of its experts as they were loaded", gains))
    spread = [_spread(one["routing"]) for one in seeds]
    kind, share = max(((kind, median(one[kind] for one in spread)) for kind in _KINDS), key=lambda entry: entry[1])
    tells = "tells" if share >= _EVEN else "hardly tells"
    lines.append(
        f"routing by domain: the router {tells} domains apart; most differs the weight of the {_spelled(kind)}, by "
        f"{percent(share)} between two domains"
    )
    for kind in _KINDS:
        most = max(weights[kind] for one in seeds for weights in one["routing"].values())
        if most < _EVEN:
            lines.append(f"the {_spelled(kind)} does not help: it has at most {percent(most)} of the weight anywhere")
    return lines


def plot(classes: Sequence[ThinkRuns], found: Mapping[str, Any], output: Path) -> None:
    """Trainings, held-out nats by domain, and routing by domain, into a PNG."""
    pyplot = plotting()

    figure, (training, nats, routing) = pyplot.subplots(1, 3, figsize=(16, 4.4), layout="constrained")
    figure.suptitle("Experts of three kinds, alone and mixed")
    for name, run in classes[0].parts.items():
        if name != "diffuser":
            tag = "loss/ce" if name in ("storeless", "full") else "loss/total"
            curve(training, read_curves(run.metrics), tag, _spelled(name))
    training.set(title=f"training, seed {classes[0].seed}", xlabel="step", ylabel="nats a token", yscale="log")
    domains = list(found["routing"])
    mixtures = {name: found[name] for name in ("full", "storeless")}
    models = {**mixtures, **{f"{name} alone": found["experts"][name] for name in LANGUAGE_MODELS}}
    width = 0.8 / len(models)
    for place, (name, of) in enumerate(models.items()):
        at = [domain + width * (place - (len(models) - 1) / 2) for domain in range(len(domains))]
        nats.bar(at, [of["domains"][domain]["nats"] for domain in domains], width, label=_spelled(name))
    nats.set(title="held out, by domain", ylabel="nats a token")
    below = [0.0] * len(domains)
    for kind in _KINDS:
        heights = [100 * found["routing"][domain][kind] for domain in domains]
        routing.bar(range(len(domains)), heights, bottom=below, label=_spelled(kind))
        below = [low + height for low, height in zip(below, heights, strict=True)]
    routing.set(title="mean weight of the experts, by domain", ylabel="%")
    for axes in (nats, routing):
        axes.set_xticks(range(len(domains)), domains, fontsize=8)
    for axes in (training, nats, routing):
        axes.legend(frameon=False, fontsize=7)
    save_figure(figure, output, dpi=110)


def _likelihoods(curves: Curves, domains: Sequence[str], tokens: float) -> dict[str, Any]:
    """Nats and perplexity of each domain, and of their mean: each counts the same, as in training."""
    found = {domain: _likelihood(_last(curves, f"valid/{domain}/loss/total")) for domain in domains}
    return {**_likelihood(fmean(each["nats"] for each in found.values())), "tokens": tokens, "domains": found}


def _likelihood(nats: float) -> dict[str, float]:
    return {"nats": nats, "perplexity": math.exp(nats)}


def _routing(curves: Curves, tag: str) -> dict[str, Any]:
    """Each expert's mean weight, the mean entropy, and under ``std`` the weights' standard deviations."""
    means = {name: _last(curves, f"{tag}/{name}") for name in (*_KINDS, "entropy")}
    return {**means, "std": {kind: _last(curves, f"{tag}/{kind}/std") for kind in _KINDS}}


def _last(curves: Curves, tag: str) -> float:
    return curves[tag][-1][1]


def _spread(routing: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of each expert, how far its weights of two domains are apart at most."""
    weights = {kind: [of[kind] for of in routing.values()] for kind in _KINDS}
    return {kind: max(each) - min(each) for kind, each in weights.items()}


def _compared(what: str, gains: Sequence[float]) -> str:
    """``gains``: nats a token saved, of each seed."""
    helping = sum(gain > _NOTHING for gain in gains)
    some = "helps with some seeds only" if helping else "does not help"
    return f"{what}: {'helps' if helping == len(gains) else some} ({median(gains):+.4f} nats a token saved)"


def _spelled(name: str) -> str:
    return name.replace("_", " ")
