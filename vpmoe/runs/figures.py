"""All figures of runs and of their models into one folder, with their numbers beside them."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from megatron_vpmoe.config import config_hash
from megatron_vpmoe.errors import visible
from megatron_vpmoe.files import sha256_of_file
from megatron_vpmoe.software import provenance
from vpmoe.errors import DataError
from vpmoe.eval.over_prompts import OverPrompts, measured, prompts_of
from vpmoe.eval.plots import plot_first_choice, plot_throughput, plot_usage
from vpmoe.eval.reports import write_report
from vpmoe.runs.panels import FIGURES, of_figure
from vpmoe.runs.plots import plot
from vpmoe.runs.queries import last_values, tags_of
from vpmoe.runs.registry import RunEntry, labels
from vpmoe.steps import check_replaceable

NAME, KIND, SCHEMA_VERSION = "figures.json", "figures", 1
OF_MODELS: dict[str, tuple[Callable[[dict[str, OverPrompts], Path], None], bool]] = {
    "kv_throughput_mean": (plot_throughput, False),
    "expert_usage_mean": (plot_usage, True),
    "first_choice_confidence_mean": (plot_first_choice, True),
}
"""Of each figure of models how it is drawn, and whether it is of their experts, which not all have."""
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_SUFFIX = ".png"


def make(
    runs: Sequence[RunEntry],
    prompts: Path,
    output_dir: Path,
    *,
    new_tokens: int,
    plain: bool,
    passages: Collection[RunEntry] = (),
    smoothing: float,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write figures of each training, ``<run>_<figure>.png``, of all models together, and their numbers as JSON.

    Args:
        runs: each with a checkpoint, whose newest is its model.
        prompts: as :func:`vpmoe.eval.over_prompts.prompts_of` reads them.
        output_dir: made if absent.
        new_tokens: written after each prompt at most.
        plain: the prompts are given as they are, not as questions of a conversation.
        passages: the runs whose models get them as text to go on with instead.
        smoothing: of the curves, see :func:`vpmoe.runs.plots.plot`.
        say: told a line about what is done and what is left out.

    Returns:
        what ``figures.json`` holds.

    Raises:
        DataError: the prompts cannot be read, or one is too long.
        NotOursError: something else lies where a figure belongs.
        CheckpointError: a run has no checkpoint.
    """
    texts, names = prompts_of(prompts), labels(runs)
    files = dict(zip(names, map(_file_name, names, runs), strict=True))
    training = {name: {figure: output_dir / f"{files[name]}_{figure}{_SUFFIX}" for figure in FIGURES} for name in names}
    for path in (*(path for of_run in training.values() for path in of_run.values()), *_of_models(output_dir).values()):
        check_replaceable(path)
    check_replaceable(output_dir / NAME, f'"kind": "{KIND}"')
    written: dict[str, list[str]] = {}
    for name, run in zip(names, runs, strict=True):
        there = tags_of([run])
        for figure, path in training[name].items():
            if panels := of_figure(figure, there):
                plot([run], panels, path, smoothing=smoothing)
                written.setdefault(figure, []).append(path.name)
            else:
                say(visible(f"{name}: no {figure}, it has recorded nothing of it"))
    of_text = {name for name, run in zip(names, runs, strict=True) if run in passages}
    models, entries, origin = _measured(
        dict(zip(names, runs, strict=True)), texts, new_tokens, plain=plain, of_text=of_text, say=say
    )
    for figure, path in _of_models(output_dir).items():
        draw, of_experts = OF_MODELS[figure]
        for name in (left_out := [name for name, one in models.items() if of_experts and not one.layers]):
            say(visible(f"{name}: not in {figure}, it has no experts"))
        if drawn := {name: one for name, one in models.items() if name not in left_out}:
            draw(drawn, path)
            written[figure] = [path.name]
    report = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "provenance": provenance(**origin),
        "prompts": {"name": prompts.name, "sha256": sha256_of_file(prompts), "count": len(texts)},
        "settings": {"new_tokens": new_tokens, "plain": plain, "passages": sorted(of_text), "smoothing": smoothing},
        "runs": entries,
        "figures": written,
    }
    write_report(output_dir / NAME, report)
    return report


def _file_name(name: str, run: RunEntry) -> str:
    """What the files of a run begin with: its name, unless another has it or a file cannot."""
    return name if _FILE.fullmatch(name) else run.id


def _of_models(output_dir: Path) -> dict[str, Path]:
    return {figure: output_dir / f"{figure}{_SUFFIX}" for figure in OF_MODELS}


def _measured(
    runs: dict[str, RunEntry],
    texts: Sequence[str],
    new_tokens: int,
    *,
    plain: bool,
    of_text: Collection[str],
    say: Callable[[str], None],
) -> tuple[dict[str, OverPrompts], dict[str, Any], dict[str, dict[str, Any]]]:
    """Of each run what its newest model does, its entry in the report, and where all of them come from."""
    from vpmoe.eval.open_model import open_model

    models, entries = {}, {}
    origin: dict[str, dict[str, Any]] = {"config_hash": {}, "tokenizer": {}, "dataset": {}}
    for name, run in runs.items():
        there = tags_of([run])
        drawn = {tag for figure in FIGURES for panel in of_figure(figure, there) for tag in panel.tags}
        if not run.is_there:
            raise DataError("the run's directory is not there", source=str(run.directory), remedy="vpmoe runs add DIR")
        with open_model(run.directory) as opened:
            models[name] = measured(
                opened,
                texts,
                new_tokens,
                plain=plain,
                passage=name in of_text,
                say=lambda line, name=name: say(visible(f"{name}: {line}")),
            )
            entries[name] = {
                "id": run.id,
                "checkpoint": opened.entry,
                "last_values": {tag: value for tag, value in last_values(run).items() if tag in drawn},
                "over_prompts": models[name].entry(),
            }
            origin["config_hash"][name] = config_hash(opened.trained or opened.cfg)
            origin["tokenizer"][name] = opened.tokenizer.identity
            origin["dataset"][name] = opened.dataset
    return models, entries, origin
