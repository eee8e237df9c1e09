"""Routing and attention of a text as HTML, tables and charts."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas

from vpmoe.app.shown import coloured, label
from vpmoe.eval.inspection import LayerAttention, LayerRouting

if TYPE_CHECKING:
    import altair

_GOLDEN = 0.618033988749895
"""Hues of experts one after the other are this apart, so that neighbours differ and no two of many are the same."""


def colour_of(expert: int) -> str:
    """Red, green and blue."""
    hue = (expert * _GOLDEN) % 1.0
    return ",".join(str(round(255 * part)) for part in colorsys.hls_to_rgb(hue, 0.5, 0.85))


def routed_html(pieces: Sequence[str], routing: LayerRouting) -> str:
    """The text, each token in the colour of its heaviest expert; under the pointer all of them."""
    told = [
        f"token {place}: " + ", ".join(f"{routing.name(e)} {w:.3f}" for e, w in zip(chosen, weight, strict=True))
        for place, (chosen, weight) in enumerate(zip(routing.chosen.tolist(), routing.weight.tolist(), strict=True))
    ]
    first = routing.chosen[:, 0].tolist()
    return coloured((piece, colour_of(e), words) for piece, e, words in zip(pieces, first, told, strict=True))


def routing_rows(pieces: Sequence[str], routing: LayerRouting) -> list[dict[str, Any]]:
    """A row a token: its experts with their weights, and how undecided the router was."""
    rows = []
    for place, piece in enumerate(pieces):
        chosen, weight = routing.chosen[place].tolist(), routing.weight[place].tolist()
        called = [routing.names[expert] if routing.names else expert for expert in chosen]
        experts = "  ".join(f"{name}: {share:.3f}" for name, share in zip(called, weight, strict=True))
        rows.append(
            {"token": place, "text": label(repr(piece)), "experts": experts, "entropy": float(routing.entropy[place])}
        )
    return rows


def load_chart(routing: LayerRouting) -> altair.LayerChart | altair.FacetChart:
    """Tokens that each expert got, of a mixture by their weights; the line is what it would be if all got the same."""
    import altair

    load = pandas.DataFrame({"expert": routing.names or np.arange(routing.experts), "tokens": routing.load})
    bars = (
        altair.Chart(load)
        .mark_bar()
        .encode(
            x=altair.X("expert:O", axis=altair.Axis(labelAngle=0, labelOverlap=True)),
            y=altair.Y("tokens:Q", title="tokens"),
            tooltip=["expert:O", "tokens:Q"],
        )
    )
    even = pandas.DataFrame({"tokens": [routing.load.sum() / routing.experts]})
    line = altair.Chart(even).mark_rule(strokeDash=[4, 3], color="gray").encode(y="tokens:Q")
    return altair.layer(bars, line, height=170)


def entropy_chart(pieces: Sequence[str], routing: LayerRouting) -> altair.Chart:
    """How undecided the router was at each token."""
    import altair

    frame = pandas.DataFrame(
        {"token": np.arange(len(pieces)), "entropy": routing.entropy, "text": [label(repr(one)) for one in pieces]}
    )
    return (
        altair.Chart(frame)
        .mark_line(point=True, strokeWidth=1)
        .encode(
            x=altair.X("token:Q", title="token"),
            y=altair.Y("entropy:Q", title="entropy (1: even)", scale=altair.Scale(zero=False)),
            tooltip=["token:Q", "text:N", altair.Tooltip("entropy:Q", format=".3f")],
        )
        .properties(height=170)
    )


def at_edge(attention: LayerAttention, head: int) -> str:
    """The share that full windows give to their farthest token."""
    window, tokens = attention.window, attention.weight.shape[1]
    if window is None or tokens < window:
        return "not reached"
    query = np.arange(window - 1, tokens)
    share = attention.weight[head, query, query - window + 1].mean()
    return f"{100 * share:.2f} %"


def attention_chart(
    pieces: Sequence[str], attention: LayerAttention, head: int, first: int, behind: int
) -> altair.LayerChart | altair.FacetChart:
    """Weights of the tokens ``first`` to ``behind - 1`` among themselves; the line is the edge of the window."""
    import altair

    part = attention.weight[head, first:behind, first:behind]
    query, key = np.tril_indices(behind - first)
    names = [label(repr(piece)) for piece in pieces]
    cells = pandas.DataFrame(
        {
            "query": query + first,
            "key": key + first,
            "weight": part[query, key].astype(np.float64),
            "asks": [names[first + one] for one in query],
            "is asked": [names[first + one] for one in key],
        }
    )
    every = max(1, (behind - first) // 16)
    ticks = altair.Axis(values=[*range(first, behind, every)], labelAngle=0)
    drawn = (
        altair.Chart(cells)
        .mark_rect()
        .encode(
            x=altair.X("key:O", title="token that is attended to", axis=ticks),
            y=altair.Y("query:O", title="token that attends", axis=ticks),
            color=altair.Color(
                "weight:Q", title="weight", scale=altair.Scale(scheme="viridis", type="sqrt", domainMin=0)
            ),
            tooltip=["query:O", "asks:N", "key:O", "is asked:N", altair.Tooltip("weight:Q", format=".4f")],
        )
        .properties(height=480)
    )
    window = attention.window
    edge = [(one, one - window + 1) for one in range(first, behind) if window and one - window + 1 >= first]
    if not edge:
        return altair.layer(drawn)
    line = pandas.DataFrame(edge, columns=["query", "key"])
    drawn_edge = altair.Chart(line).mark_line(color="red", strokeWidth=1.5).encode(x="key:O", y="query:O")
    return altair.layer(drawn, drawn_edge)


def sink_chart(pieces: Sequence[str], attention: LayerAttention, head: int) -> altair.Chart:
    """What each token leaves to the sink, of one head."""
    import altair

    frame = pandas.DataFrame(
        {
            "token": np.arange(len(pieces)),
            "sink": attention.sink[head].astype(np.float64),
            "text": [label(repr(one)) for one in pieces],
        }
    )
    return (
        altair.Chart(frame)
        .mark_bar()
        .encode(
            x=altair.X("token:Q", title="token"),
            y=altair.Y("sink:Q", title="share", scale=altair.Scale(domain=[0, 1])),
            tooltip=["token:Q", "text:N", altair.Tooltip("sink:Q", format=".3f")],
        )
        .properties(height=200)
    )


def sink_rows(attention: LayerAttention) -> list[dict[str, Any]]:
    """A row a head."""
    sink = attention.sink
    return [
        {"head": head, "sink, mean": float(sink[head].mean()), "sink, largest": float(sink[head].max())}
        for head in range(len(sink))
    ]
