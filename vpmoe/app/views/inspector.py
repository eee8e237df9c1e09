"""Routing inspector: where the tokens of a text go in a layer, and what the layer's heads attend to, in one model or in
several side by side."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit

from vpmoe.app import inspected
from vpmoe.app.models import choices, held, pick_beside, stamp_of
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

if TYPE_CHECKING:
    from streamlit.delta_generator import DeltaGenerator

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
    paths = pick_beside(places, runs, key="inspector")
    if not any(paths):
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
    for number, (path, column) in enumerate(zip(paths, streamlit.columns(len(paths)), strict=True)):
        if path is not None:
            with column:
                stamp = stamp_of(path)
                ids, pieces = _tokens(str(path), stamp, words, how == "plain text")
                look = _attention if view == "Attention" else _routing
                look(path, stamp, ids, pieces, _Place(number, is_alone=len(paths) == 1))


@dataclass(frozen=True)
class _Place:
    """Where a model is shown: the number of its column, and whether that has the whole page."""

    number: int
    is_alone: bool

    def key(self, name: str) -> str:
        """Of a widget."""
        return f"inspector_{name}_{self.number}"

    def split(self, left: int, right: int) -> tuple[DeltaGenerator, DeltaGenerator]:
        """Two parts side by side, or where that is too narrow one below the other."""
        if self.is_alone:
            first, second = streamlit.columns([left, right])
            return first, second
        return streamlit.container(), streamlit.container()

    def metrics(self, told: dict[str, str], **helps: str | None) -> None:
        """Numbers in a row, or in two."""
        columns = streamlit.columns(4 if self.is_alone else 2)
        for place, (name, value) in enumerate(told.items()):
            columns[place % len(columns)].metric(name, value, help=helps.get(name))


def _routing(path: Path, stamp: float, ids: tuple[int, ...], pieces: list[str], place: _Place) -> None:
    found = _routed(str(path), stamp, ids)
    if not found:
        empty("This model has no experts. Its attention can be looked at: choose the other view.")
        return
    layer = next(iter(found))
    if len(found) > 1:
        layer = streamlit.select_slider("Layer", [*found], key=place.key("layer"))
    routing: LayerRouting = found[layer]
    used = int((routing.load > 0).sum())
    place.metrics(
        {
            "Tokens": f"{len(ids):,}",
            "Experts a token": f"{routing.chosen.shape[1]}",
            "Experts used by this text": f"{used} of {routing.experts}",
            "Entropy of the scores, mean (1: even)": f"{routing.entropy.mean():.3f}",
        }
    )
    streamlit.subheader("Tokens, coloured by their heaviest expert", anchor=False)
    streamlit.html(inspected.routed_html(pieces, routing))
    left, right = place.split(1, 1)
    with left:
        streamlit.subheader("Experts of every token", anchor=False)
        table(inspected.routing_rows(pieces, routing), height=360)
    with right:
        streamlit.subheader("Use of the experts", anchor=False)
        streamlit.altair_chart(inspected.load_chart(routing), width="stretch")
        streamlit.altair_chart(inspected.entropy_chart(pieces, routing), width="stretch")


def _attention(path: Path, stamp: float, ids: tuple[int, ...], pieces: list[str], place: _Place) -> None:
    numbers = _layers(str(path), stamp)
    if not numbers:
        empty("This model has no attention to look at.")
        return
    left, right = place.split(1, 1)
    layer = left.select_slider("Layer", numbers, key=place.key("attention_layer")) if len(numbers) > 1 else 1
    attention = _attended(str(path), stamp, ids, layer)
    heads = attention.weight.shape[0]
    head = right.slider("Head", 0, heads - 1, 0, key=place.key("head")) if heads > 1 else 0
    window, edge = attention.window, "At the window's edge, this head"
    even = None if window is None else f"An even window of {window:,} gives {100 / window:.2f} %."
    place.metrics(
        {
            "A query sees": "the whole text" if window is None else f"{window:,} tokens",
            "Positions": attention.position.replace("_", "-"),
            "Left to the sink, all heads": f"{100 * attention.sink.mean():.1f} %" if attention.has_sink else "no sink",
            edge: inspected.at_edge(attention, head),
        },
        **{edge: even},
    )
    first = 0
    if len(ids) > _SHOWN:
        last = len(ids) - _SHOWN
        first = streamlit.slider("First token shown", 0, last, last, key=place.key("first"))
    left, right = place.split(3, 2)
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


@streamlit.cache_data(max_entries=4, show_spinner="Running the model …")  # H · T² numbers each
def _attended(path: str, stamp: float, ids: tuple[int, ...], layer: int) -> LayerAttention:
    with held(Path(path)).used() as opened:
        return attention_of(opened.model, [*ids], layer)


@streamlit.cache_data(max_entries=8, show_spinner=False)
def _layers(path: str, stamp: float) -> list[int]:
    with held(Path(path)).used() as opened:
        return layer_numbers(opened.model)
