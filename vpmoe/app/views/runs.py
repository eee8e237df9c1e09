"""Runs: curves of one or several, while they train as well; their configurations, checkpoints and samples."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import streamlit

from vpmoe.app import curves, run_files
from vpmoe.app.places import Places
from vpmoe.app.shown import empty, label, table, text
from vpmoe.app.store import CHOSEN, names_of, no_runs, runs_of, series_now, smoothed_now, steps_now, table_of, tags_now
from vpmoe.runs.comparison import config_differences
from vpmoe.runs.registry import RunEntry

_EVERY = "2s"
_COLUMNS = 2
_AXES = {"step": "step", "tokens": "tokens", "time": "time"}


def show(places: Places) -> None:
    """The page."""
    runs = runs_of(places)
    if not runs:
        no_runs()
        return
    names = names_of(runs)
    by_id = {run.id: run for run in runs}
    named = [run.id for run in runs if {run.id, run.name} & {*streamlit.query_params.get_all("run")}]
    # What was just chosen; else what was before another page was looked at; else what the URL names.
    state = streamlit.session_state
    kept = state.get("runs_chosen", state.get(CHOSEN, named or [runs[0].id]))
    state["runs_chosen"] = [one for one in kept if one in by_id]
    chosen = streamlit.multiselect("Runs", [*by_id], format_func=names.__getitem__, key="runs_chosen")
    state[CHOSEN] = chosen
    # Of a table alone the browser loads half a second: sent once it is asked for.
    every = streamlit.expander(f"All runs of the store ({len(runs):,})", key="runs_every", on_change="rerun")
    if every.open:
        with every:
            table(table_of(runs))
    if not chosen:
        streamlit.info("Choose one run, or several to hold them against each other.")
        return
    picked = [by_id[one] for one in chosen]
    views = {
        "Curves": partial(_curves, places, names),
        "Configuration": _configuration,
        "Checkpoints": _checkpoints,
        "Samples": _samples,
        "About": _about,
    }
    view = streamlit.segmented_control("View", [*views], default="Curves", required=True, label_visibility="collapsed")
    views[view or "Curves"](picked)


def _curves(places: Places, names: dict[str, str], runs: Sequence[RunEntry]) -> None:
    tags = tags_now(runs)
    if not tags:
        streamlit.info("Nothing is recorded yet. Curves appear with the first logged step.")
        return
    with streamlit.container(horizontal=True, vertical_alignment="bottom"):
        by = streamlit.segmented_control("Over", [*_AXES], default="step", required=True, key="curves_by") or "step"
        share = streamlit.slider("Smoothing", 0.0, 0.99, 0.0, 0.01, key="curves_smoothing", width=240)
        log_x = streamlit.toggle("log x", key="curves_log_x")
        log_y = streamlit.toggle("log y", key="curves_log_y")
    shown = streamlit.multiselect(
        "Metrics", tags, default=curves.first_tags(tags), format_func=label, key="curves_tags"
    )
    live = any(run.status == "running" for run in runs)
    ids = {run.id for run in runs}

    @streamlit.fragment(run_every=_EVERY if live else None)
    def drawn() -> None:
        now = [run for run in runs_of(places) if run.id in ids]
        _states(now, names)
        frame = series_now(now, shown, by)
        if (broken := curves.not_finite(frame)) > 0:
            streamlit.warning(f"{broken:,} of the values are no finite number; they are left out of the curves.")
        smooth = smoothed_now(now, shown, by, share)
        columns = streamlit.columns(min(_COLUMNS, max(len(shown), 1)))
        for place, tag in enumerate(shown):
            picture = curves.chart(smooth, tag, {one: names[one] for one in ids}, by=by, log_x=log_x, log_y=log_y)
            columns[place % len(columns)].altair_chart(picture, width="stretch")
        if by != "step" and frame.empty and shown:
            streamlit.info(f"These runs do not record {by}: they are of an earlier version. Choose step.")

    drawn()


def _states(runs: Sequence[RunEntry], names: dict[str, str]) -> None:
    steps = steps_now(runs)
    for run in runs:
        last = run.config.get("training", {}).get("train_iters")
        of = f" of {last:,}" if isinstance(last, int) else ""
        text(f"{names[run.id]}: {run.status}, step {steps.get(run.id, run.step):,}{of}")
        if run.error:
            streamlit.code(label(run.error), language=None, wrap_lines=True)


def _configuration(runs: Sequence[RunEntry]) -> None:
    names = names_of(runs)
    if len(runs) > 1:
        differences = config_differences(runs)
        if not differences:
            streamlit.info("The configurations of these runs are the same.")
            return
        streamlit.subheader("Where the configurations differ")
        table(
            [
                {"field": field, **{names[run.id]: str(value) for run, value in zip(runs, values, strict=True)}}
                for field, values in differences
            ]
        )
        return
    rows = [
        {"field": f"{section}.{name}", "value": str(value)}
        for section, values in runs[0].config.items()
        for name, value in values.items()
    ]
    table(rows, height=600)


def _checkpoints(runs: Sequence[RunEntry]) -> None:
    hashes = streamlit.toggle("compare contents too (reads every byte)", key="checkpoint_hashes")
    for run in runs:
        streamlit.subheader("Checkpoints", anchor=False)
        text(f"{run.name}: {run.directory}")
        rows = run_files.checkpoint_rows(run.directory, check_hashes=hashes)
        if rows:
            table(rows)
        elif run.is_there:
            empty("It has saved no checkpoint yet.")
        else:
            empty("Its directory is not there any more.")


def _samples(runs: Sequence[RunEntry]) -> None:
    names = names_of(runs)
    for run in runs:
        samples = run_files.samples_of(run.directory)
        if not samples:
            text(f"{names[run.id]} has no samples")
            empty(
                "A run answers held-out prompts where it is told how often:", "vpmoe train CONFIG --sample-interval 500"
            )
            continue
        steps = sorted({step for step, _, _ in samples})
        step, heading = steps[-1], streamlit.container()
        if len(steps) > 1:
            step = streamlit.select_slider("Step", steps, value=step, key=f"samples_{run.id}")
        with heading:
            text(f"{names[run.id]}, step {step:,}")
        for at, prompt, completion in samples:
            if at == step:
                with streamlit.container(border=True):
                    streamlit.html(run_files.sample_html(prompt, completion))


def _about(runs: Sequence[RunEntry]) -> None:
    for run in runs:
        streamlit.subheader("Run", anchor=False)
        git, hardware = run.provenance.get("git") or {}, run.provenance.get("hardware") or {}
        facts = {
            "name": run.name,
            "id": run.id,
            "directory": str(run.directory),
            "status": run.status,
            "started": f"{len(run.segments)} times" if len(run.segments) > 1 else "once",
            "host, process": f"{run.host}, {run.pid}",
            "processes": str(run.world_size),
            "git": f"{git.get('sha', 'unknown')}{' with changes' if git.get('dirty') else ''}",
            "config hash": str(run.provenance.get("config_hash", "unknown")),
            "hardware": ", ".join(f"{name} {value}" for name, value in hardware.items()) or "unknown",
            "tags": ", ".join(run.tags) or "none",
            "note": run.note or "none",
        }
        table([{"": name, "value": value} for name, value in facts.items()])
        if run.results:
            table([{"result": tag, "value": value} for tag, value in run.results.items()])
