"""Router: how the load lies on layers and experts over a run, its health, and experts that nothing reaches."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import streamlit

from megatron_vpmoe.metrics.expert_loads import FILE_NAME, read_expert_loads
from vpmoe.app import curves
from vpmoe.app.loads import MEASURES, MOST_STEPS, dead_experts, heatmap, measured
from vpmoe.app.places import Places
from vpmoe.app.shown import empty, table
from vpmoe.app.store import CHOSEN, names_of, no_runs, runs_of, smoothed_now, tags_now

_AGGREGATE = "moe/router_agg/"
_FIRST = ("mean_cv_pct", "max_vio", "dead_experts_count", "mean_entropy", "max_load_pct", "expert_bias_range")


def show(places: Places) -> None:
    """The page."""
    runs = runs_of(places)
    if not runs:
        no_runs()
        return
    names, by_id = names_of(runs), {run.id: run for run in runs}
    ids = [*by_id]
    first = next((ids.index(one) for one in streamlit.session_state.get(CHOSEN, ()) if one in by_id), 0)
    chosen = streamlit.selectbox("Run", ids, first, format_func=names.__getitem__, key="router_run")
    run = by_id[chosen]

    @streamlit.fragment(run_every="5s" if run.status == "running" else None)
    def drawn() -> None:
        path = run.directory / FILE_NAME
        if path.is_file():
            _loads(path)
        else:
            empty(
                "This run has recorded no loads of experts: its layers choose none, or an earlier version trained it. "
                "The weights of a mixture's experts are among its metrics: routing/..."
            )
        tags = [tag for tag in tags_now([run]) if tag.startswith(_AGGREGATE)]
        if tags:
            streamlit.subheader("Health, over all layers", anchor=False)
            shown = [_AGGREGATE + name for name in _FIRST if _AGGREGATE + name in tags]
            frame = smoothed_now([run], shown, "step", 0.0)
            columns = streamlit.columns(3)
            for place, tag in enumerate(shown):
                picture = curves.chart(frame, tag, {run.id: names[run.id]}, by="step", log_x=False, log_y=False)
                columns[place % 3].altair_chart(picture, width="stretch")

    drawn()


def _step(steps: list[int]) -> int:
    """The chosen one; who looks at the newest goes on to the next, and one that is no longer drawn is the newest."""
    state = streamlit.session_state
    if state.get("router_step") == state.get("router_newest") or state.get("router_step") not in steps:
        state["router_step"] = steps[-1]
    state["router_newest"] = steps[-1]
    return streamlit.select_slider("Step", steps, key="router_step") if len(steps) > 1 else steps[0]


def _loads(path: Path) -> None:
    loads = read_expert_loads(path, most=MOST_STEPS)
    if not len(loads.steps):
        streamlit.info("Nothing is recorded yet. Loads appear with the first logged step.")
        return
    steps, (layers, experts) = loads.steps.tolist(), loads.load_TLE.shape[1:]
    dead = dead_experts(loads)
    columns = streamlit.columns(4)
    worst = measured(loads, "maximal violation")[-1]
    columns[0].metric("Layers with experts", layers)
    columns[1].metric("Experts a layer", experts)
    columns[2].metric("Without a token at the last record", len(dead))
    columns[3].metric("Busiest expert, times the mean", f"{1 + worst.max():.2f}")
    title = "multiple of the mean load"
    streamlit.subheader("Layers and experts at a step", anchor=False)
    step = _step(steps)
    at = steps.index(step)
    streamlit.altair_chart(
        heatmap(
            loads.load_TLE[at],
            range(experts),
            loads.layers,
            across_title="expert",
            down_title="layer",
            value_title=title,
            balanced=True,
        ),
        width="stretch",
    )
    streamlit.subheader("Over the steps", anchor=False)
    left, right = streamlit.columns(2)
    with left:
        measure = streamlit.selectbox("Of every layer", [*MEASURES], key="router_measure")
        streamlit.altair_chart(
            heatmap(
                measured(loads, measure).T,
                steps,
                loads.layers,
                across_title="step",
                down_title="layer",
                value_title=measure,
                balanced=False,
            ),
            width="stretch",
        )
    with right:
        layer = streamlit.selectbox("Every expert of layer", loads.layers, key="router_layer")
        streamlit.altair_chart(
            heatmap(
                np.asarray(loads.load_TLE[:, loads.layers.index(layer)]).T,
                steps,
                range(experts),
                across_title="step",
                down_title="expert",
                value_title=title,
                balanced=True,
            ),
            width="stretch",
        )
    if dead:
        streamlit.subheader("Experts without a token", anchor=False)
        table(dead)
