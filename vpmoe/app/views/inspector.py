"""Routing inspector: where the tokens of a text go in a layer, and what the layer's heads attend to."""

from __future__ import annotations

from pathlib import Path

import streamlit

from vpmoe.app import inspected
from vpmoe.app.models import choices, held, pick, stamp_of
from vpmoe.app.places import Places
from vpmoe.app.shown import empty, table
from vpmoe.app.store import runs_of
from vpmoe.eval.asking import form_of
from vpmoe.eval.inspection import (
    LayerAttention,
    LayerRouting,
    attention_of,
    given_ids,
    layer_numbers,
    pieces_of,
    routing_of,
)

_SHOWN = 96
"""Tokens of a heatmap's side."""


def show(places: Places) -> None:
    """The page."""
    runs = runs_of(places)
    if not choices(places, runs):
        empty(
            "No model is at hand. Train one, name one when the app starts, or type the path of one below:",
            "vpmoe quickstart",
            "vpmoe app runs/NAME",
        )
    path = pick(places, runs, key="inspector_model")
    if path is None:
        return
    left, right = streamlit.columns([3, 1])
    words = left.text_area("Text", "What is 37 + 58?", key="inspector_text", persist_state="session")
    with right:
        how = streamlit.radio(
            "Read as",
            ["a question in a conversation", "plain text"],
            key="inspector_form",
            persist_state="session",
            help="The model's own messages stand before a question.",
        )
        view = streamlit.segmented_control(
            "View",
            ["Routing", "Attention"],
            default="Routing",
            required=True,
            key="inspector_view",
            persist_state="session",
        )
    if not words:
        streamlit.info("Write a text above.")
        return
    stamp = stamp_of(path)
    ids, pieces = _tokens(str(path), stamp, words, how == "plain text")
    if view == "Attention":
        _attention(path, stamp, ids, pieces)
    else:
        _routing(path, stamp, ids, pieces)


def _routing(path: Path, stamp: float, ids: tuple[int, ...], pieces: list[str]) -> None:
    found = _routed(str(path), stamp, ids)
    if not found:
        empty("This model has no experts. Its attention can be looked at: choose the other view.")
        return
    layer = streamlit.select_slider("Layer", [*found], key="inspector_layer") if len(found) > 1 else next(iter(found))
    routing: LayerRouting = found[layer]
    used = int((routing.load > 0).sum())
    columns = streamlit.columns(4)
    columns[0].metric("Tokens", f"{len(ids):,}")
    columns[1].metric("Experts a token", routing.chosen.shape[1])
    columns[2].metric("Experts used by this text", f"{used} of {routing.experts}")
    columns[3].metric("Entropy of the scores, mean (1: even)", f"{routing.entropy.mean():.3f}")
    streamlit.subheader("Tokens, coloured by their heaviest expert", anchor=False)
    streamlit.html(inspected.routed_html(pieces, routing))
    left, right = streamlit.columns(2)
    with left:
        streamlit.subheader("Experts of every token", anchor=False)
        table(inspected.routing_rows(pieces, routing), height=360)
    with right:
        streamlit.subheader("Use of the experts", anchor=False)
        streamlit.altair_chart(inspected.load_chart(routing), width="stretch")
        streamlit.altair_chart(inspected.entropy_chart(pieces, routing), width="stretch")


def _attention(path: Path, stamp: float, ids: tuple[int, ...], pieces: list[str]) -> None:
    numbers = _layers(str(path), stamp)
    left, right = streamlit.columns(2)
    layer = left.select_slider("Layer", numbers, key="inspector_attention_layer") if len(numbers) > 1 else 1
    attention = _attended(str(path), stamp, ids, layer)
    heads = attention.weight.shape[0]
    head = right.slider("Head", 0, heads - 1, 0, key="inspector_head") if heads > 1 else 0
    columns = streamlit.columns(4)
    window = "the whole text" if attention.window is None else f"{attention.window:,} tokens"
    columns[0].metric("A query sees", window)
    columns[1].metric("Positions", attention.position.replace("_", "-"))
    sink = f"{100 * attention.sink.mean():.1f} %" if attention.has_sink else "no sink"
    columns[2].metric("Left to the sink, all heads", sink)
    even = (
        None
        if attention.window is None
        else f"An even window of {attention.window:,} gives {100 / attention.window:.2f} %."
    )
    columns[3].metric("At the window's edge, this head", inspected.at_edge(attention, head), help=even)
    first = 0
    if len(ids) > _SHOWN:
        first = streamlit.slider("First token shown", 0, len(ids) - _SHOWN, len(ids) - _SHOWN, key="inspector_first")
    left, right = streamlit.columns([3, 2])
    with left:
        streamlit.subheader("What each token takes of each", anchor=False)
        picture = inspected.attention_chart(pieces, attention, head, first, min(first + _SHOWN, len(ids)))
        streamlit.altair_chart(picture, width="stretch")
    with right:
        streamlit.subheader("Left to the sink", anchor=False)
        if attention.has_sink:
            streamlit.altair_chart(inspected.sink_chart(pieces, attention, head), width="stretch")
            table(inspected.sink_rows(attention))
        else:
            streamlit.info("This layer's heads have no sink: all that a token attends with goes to tokens.")


@streamlit.cache_data(max_entries=16, show_spinner=False)
def _tokens(path: str, stamp: float, words: str, plain: bool) -> tuple[tuple[int, ...], list[str]]:
    with held(Path(path)).used() as opened:
        form = form_of(opened, plain=plain, system=None, developer=None, say=lambda _: None)
        whole = given_ids(form, words)
        return tuple(whole), pieces_of(opened.tokenizer, whole)


@streamlit.cache_data(max_entries=8, show_spinner="Running the model …")
def _routed(path: str, stamp: float, ids: tuple[int, ...]) -> dict[int, LayerRouting]:
    with held(Path(path)).used() as opened:
        return routing_of(opened.model, [*ids])


@streamlit.cache_data(max_entries=2, show_spinner="Running the model …")  # H · T² numbers each
def _attended(path: str, stamp: float, ids: tuple[int, ...], layer: int) -> LayerAttention:
    with held(Path(path)).used() as opened:
        return attention_of(opened.model, [*ids], layer)


@streamlit.cache_data(max_entries=8, show_spinner=False)
def _layers(path: str, stamp: float) -> list[int]:
    with held(Path(path)).used() as opened:
        return layer_numbers(opened.model)
