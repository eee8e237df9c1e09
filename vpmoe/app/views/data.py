"""Data: conversations of a built dataset with their spans, a teacher's alternatives, statistics."""

from __future__ import annotations

from pathlib import Path

import altair
import pandas
import streamlit

from megatron_vpmoe.manifest import Content
from vpmoe.app import datasets
from vpmoe.app.places import Places
from vpmoe.app.shown import SPAN_COLOURS, empty, label, legend, path_label, table, text
from vpmoe.app.store import runs_of
from vpmoe.data_curation.checks.sample import histogram, sample_split
from vpmoe.data_curation.look.inspect import facts, length_bars
from vpmoe.data_curation.look.text import documents
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.tokenizer.from_dataset import load_tokenizer

_SAMPLED = 20_000
"""Documents that the spans' lengths are read of."""
_BARS = 24


def show(places: Places) -> None:
    """The page."""
    of_runs = [path for run in runs_of(places) for path in datasets.trained_on(run)]
    offered = datasets.datasets_in([*places.datasets, *of_runs])
    chosen = streamlit.selectbox(
        "Dataset",
        [*map(str, offered)],
        index=0 if offered else None,
        format_func=path_label,
        accept_new_options=True,
        placeholder="the folder of a built dataset",
        key="data_folder",
        persist_state="session",
        help="Those that the command was given and that runs were trained on, or the folder of any other: type it.",
    )
    if not chosen:
        empty(
            "No dataset is at hand. Make one, or name one when the app starts:",
            "vpmoe quickstart",
            "vpmoe data build --help",
            "vpmoe app --dataset data/megatron/NAME",
        )
        return
    folder = Path(chosen)
    manifest = datasets.open_manifest(folder)
    table(datasets.figures(manifest))
    tokenizer = manifest["tokenizer"]
    text("\n".join([f"vocabulary {tokenizer['name']}, {tokenizer['vocab_size']:,} ids", *facts(manifest)]))
    left, middle, right = streamlit.columns(3)
    split = str(left.selectbox("Split", [*manifest["splits"]], key="data_split", format_func=label))
    rows = manifest["splits"][split]["rows"]
    if not rows:
        streamlit.info("This split has no documents.")
        return
    start = middle.number_input(f"First document (0 to {rows - 1:,})", 0, rows - 1, 0, key="data_start")
    count = right.number_input("Documents", 1, 50, 3, key="data_count")
    view = streamlit.segmented_control(
        "View", ["Conversations", "Statistics"], default="Conversations", required=True, label_visibility="collapsed"
    )
    if view == "Statistics":
        _statistics(folder, manifest, split)
    else:
        _conversations(folder, manifest, split, int(start), int(count))


def _conversations(folder: Path, manifest: dict, split: str, start: int, count: int) -> None:
    legend(SPAN_COLOURS)
    alternatives = 0
    if Content.model_validate(manifest).teacher is not None:
        alternatives = streamlit.slider("Alternatives of the teacher", 0, 16, 5, key="data_alternatives")
    for shown in documents(folder, manifest, load_tokenizer(folder), split, start, count, alternatives):
        with streamlit.container(border=True):
            text(f"{split} {shown.place:,}: {shown.tokens:,} tokens, {shown.supervised:,} supervised")
            streamlit.html(datasets.document_html(shown))
            if shown.judged:
                streamlit.subheader("A teacher's view", anchor=False)
                streamlit.html(datasets.judged_html(shown))
                with streamlit.expander("Token by token"):
                    table(datasets.judged_rows(shown))


def _statistics(folder: Path, manifest: dict, split: str) -> None:
    streamlit.subheader("Tokens a document", anchor=False)
    _bars([(bar.low, bar.high, bar.count) for bar in length_bars(manifest, split)])
    lengths, described = _lengths(str(folder), (folder / "manifest.json").stat().st_mtime, split)
    streamlit.subheader("Tokens of each span in a document", anchor=False)
    text(described)
    columns = streamlit.columns(len(SPAN_NAMES))
    for column, name in zip(columns, SPAN_NAMES, strict=True):
        with column:
            text(name, colour=SPAN_COLOURS[name])
            _bars(lengths[name])


def _bars(bars: list[tuple[int, int, int]]) -> None:
    frame = pandas.DataFrame(
        {
            "tokens": [f"{low:,}–{high:,}" if high > low else f"{low:,}" for low, high, _ in bars],
            "documents": [count for _, _, count in bars],
        }
    )
    picture = (
        altair.Chart(frame)
        .mark_bar()
        .encode(
            x=altair.X("tokens:N", sort=None, axis=altair.Axis(labelAngle=-40, labelOverlap=True)),
            y="documents:Q",
            tooltip=["tokens:N", "documents:Q"],
        )
        .properties(height=240)
    )
    streamlit.altair_chart(picture, width="stretch")


@streamlit.cache_data(max_entries=8, show_spinner="Reading lengths …")
def _lengths(folder: str, stamp: float, split: str) -> tuple[dict[str, list[tuple[int, int, int]]], str]:
    manifest = datasets.open_manifest(Path(folder))
    sample = sample_split(Path(folder), manifest, split, _SAMPLED, tokens=False)
    bars = {name: histogram(sample.lengths[name], _BARS) for name in SPAN_NAMES}
    return {name: [(bar.low, bar.high, bar.count) for bar in some] for name, some in bars.items()}, sample.described
