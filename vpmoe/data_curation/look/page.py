"""Showing a built dataset as one self-contained HTML page: no script, nothing loaded, all text escaped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

from megatron_vpmoe.files import write_atomically
from vpmoe.data_curation.checks.stats_sample import Bar, histogram, sample_split
from vpmoe.data_curation.look.inspect import check_place, figure_rows, manifest_bars, token_manifest
from vpmoe.data_curation.look.text import RUN_KINDS, documents, visible
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.tokenizer.from_dataset import load_tokenizer

_BARS = 32
_WIDTH, _HEIGHT, _MARGIN = 420, 130, 26

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ name }}, {{ split }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d2430; --paper: #fbfbf9; --line: #d5d8dd; --context: #6b7280;
  --analysis: #0b6e99; --final: #2f7d32; --special: #a21caf; --bar: #64748b; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e6ea; --paper: #14171c; --line: #363c46; --context: #98a1ae;
  --analysis: #5cc4ee; --final: #7ed082; --special: #e58bf0; --bar: #8b9bb0; } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper); max-width: 70rem;
  margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { border: 1px solid var(--line); padding: .25rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; }
.charts { display: flex; flex-wrap: wrap; gap: 1rem; } figure { margin: 0; } figcaption { font-weight: 600; }
svg text { font: 11px system-ui, sans-serif; fill: var(--ink); }
.text { white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; border: 1px solid var(--line);
  border-radius: 6px; padding: .7rem; font: 13px/1.5 ui-monospace, monospace; }
.text span { unicode-bidi: isolate; }
.context { color: var(--context); fill: var(--context); } .analysis { color: var(--analysis); fill: var(--analysis); }
.final { color: var(--final); fill: var(--final); } .special { color: var(--special); font-weight: 600; }
.all { fill: var(--bar); }
</style>
</head>
<body>
<h1>{{ name }}</h1>
<p>{{ manifest.kind }}, {{ manifest.tokenizer.name }}, {{ "{:,}".format(manifest.tokenizer.vocab_size) }} ids,
sequence length {{ manifest.seq_length }}, config {{ manifest.config_hash }}</p>
<table>
<tr>{% for heading in headings %}<th>{{ heading }}</th>{% endfor %}</tr>
{% for row in rows %}<tr>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}</table>
<p>{{ caption }}</p>
<h2>Tokens a document, {{ split }}</h2>
<div class="charts">
{% for chart in charts %}<figure>
<figcaption>{{ chart.title }}</figcaption>
<svg viewBox="0 0 {{ width }} {{ height }}" width="{{ width }}" height="{{ height }}" role="img"
 aria-label="histogram: {{ chart.title }}">
{% for bar in chart.bars %}<rect class="{{ chart.kind }}" x="{{ bar.x }}" y="{{ bar.y }}" width="{{ bar.width }}"
 height="{{ bar.height }}"><title>{{ bar.label }}</title></rect>
{% endfor %}<line x1="0" x2="{{ width }}" y1="{{ base }}" y2="{{ base }}" stroke="currentColor"/>
<text x="0" y="{{ height - 8 }}">{{ chart.low }}</text>
<text x="{{ width }}" y="{{ height - 8 }}" text-anchor="end">{{ chart.high }}</text>
<text x="{{ width }}" y="12" text-anchor="end">{{ chart.most }}</text>
</svg>
</figure>
{% endfor %}</div>
<h2>Documents</h2>
<p>spans: {% for kind in kinds %}<span class="{{ kind }}">{{ kind }}</span> {% endfor %}</p>
{% for shown in documents %}<h3>{{ split }} {{ shown.place }}: {{ shown.tokens }} tokens,
{{ shown.supervised }} supervised</h3>
<div class="text" dir="auto">{% for kind, text in shown.runs -%}
<span class="{{ kind }}">{{ text }}</span>
{%- endfor %}</div>
{% endfor %}</body>
</html>
"""


def write_page(dataset_dir: Path, page: Path, *, split: str = "train", count: int = 3, start: int = 0) -> None:
    """Write figures, histograms and ``count`` documents of ``split`` from the ``start``-th on to ``page``.

    Raises:
        DataError: no such dataset or split, or no document at ``start``.
    """
    manifest = token_manifest(dataset_dir)
    check_place(manifest, split, count, start)
    sample = sample_split(dataset_dir, manifest, split, tokens=False)
    headings, rows, caption = figure_rows(manifest)
    charts = [_chart("all", f"whole, all {sample.rows:,} documents", manifest_bars(manifest, split))]
    for name in SPAN_NAMES:
        charts.append(_chart(name, f"{name}, {sample.described}", histogram(sample.lengths[name], _BARS)))
    template = Environment(autoescape=True, undefined=StrictUndefined).from_string(_PAGE)
    text = template.render(
        name=visible(dataset_dir.resolve().name),
        split=split,
        manifest=manifest,
        headings=headings,
        rows=rows,
        caption=caption,
        charts=charts,
        width=_WIDTH,
        height=_HEIGHT,
        base=_HEIGHT - _MARGIN,
        kinds=RUN_KINDS,
        documents=documents(dataset_dir, manifest, load_tokenizer(dataset_dir), split, start, count),
    )
    write_atomically(page, text.encode())


def _chart(kind: str, title: str, bars: list[Bar]) -> dict[str, Any]:
    """A histogram in the coordinates of its drawing."""
    most = max((bar.count for bar in bars), default=0)
    step, base = _WIDTH / max(len(bars), 1), _HEIGHT - _MARGIN
    drawn = []
    for at, bar in enumerate(bars):
        height = round((base - 16) * bar.count / most, 1)
        label = f"{bar.low} to {bar.high} tokens: {bar.count:,}"
        x, width = round(at * step, 1), round(max(step - 1, 0.5), 1)
        drawn.append({"x": x, "y": round(base - height, 1), "width": width, "height": height, "label": label})
    low, high = (f"{bars[0].low} tokens", f"{bars[-1].high} tokens") if bars else ("no documents", "")
    return {"kind": kind, "title": title, "bars": drawn, "low": low, "high": high, "most": f"highest bar {most:,}"}
