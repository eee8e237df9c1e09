"""The run store for pages: asked again only where a file has changed."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pandas
import streamlit

from megatron_vpmoe.errors import VpmoeError
from vpmoe.app import curves
from vpmoe.app.places import Places
from vpmoe.app.records import Records
from vpmoe.app.shown import distinct, empty, label
from vpmoe.runs.queries import series, smoothed, tags_of
from vpmoe.runs.registry import RunEntry, list_runs

CHOSEN = "chosen_runs"
"""Ids of the runs that were looked at last, in the state of a session: pages begin with them."""
_KEPT = 32
_RECORDS = Records()
_POINTS = 1000  # of a curve: about two a pixel of its picture


def runs_of(places: Places) -> list[RunEntry]:
    """The newest first."""
    return list_runs(places.runs_store)


def names_of(runs: Sequence[RunEntry]) -> dict[str, str]:
    """Id -> what a run is called."""
    return dict(
        zip([run.id for run in runs], distinct([run.name for run in runs], [run.id for run in runs]), strict=True)
    )


def no_runs() -> None:
    """What is shown where there are none."""
    empty(
        "No run has registered itself yet. Train one, or add the directory of one that is older:",
        "vpmoe quickstart",
        "vpmoe train configs/nano/stage1.yaml",
        "vpmoe runs add runs/NAME",
    )


def tags_now(runs: Sequence[RunEntry]) -> list[str]:
    """As ``tags_of``."""
    return _tags(_Asked(runs))


def series_now(runs: Sequence[RunEntry], tags: Sequence[str], by: str) -> pandas.DataFrame:
    """As ``series``."""
    return _series(_Asked(runs), tuple(tags), by)


def smoothed_now(runs: Sequence[RunEntry], tags: Sequence[str], by: str, share: float) -> pandas.DataFrame:
    """As ``smoothed``, of every point, and then thinned; ``share`` 0: the curves as ``series_now`` has them."""
    return _smoothed(_Asked(runs), tuple(tags), by, share)


def steps_now(runs: Sequence[RunEntry]) -> dict[str, int]:
    """The last recorded step of each run, also of one that trains: the store itself learns of it now and then."""
    return _steps(_Asked(runs))


def warm(places: Places) -> None:
    """What the first page asks of the newest run, before anybody does."""
    with suppress(VpmoeError, OSError):  # the page tells it
        newest = runs_of(places)[:1]
        shown = curves.first_tags(tags_now(newest))
        steps_now(newest)
        frame = smoothed_now(newest, shown, "step", 0.0)
        for tag in shown[:1]:
            curves.chart(frame, tag, names_of(newest), by="step", log_x=False, log_y=False).to_dict()


class _Asked:
    """Runs, equal as long as their files are."""

    def __init__(self, runs: Sequence[RunEntry]) -> None:
        self.runs = runs
        self.key = tuple((run.id, _signature(run.metrics)) for run in runs)


def _signature(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size


@streamlit.cache_data(max_entries=_KEPT, show_spinner=False, hash_funcs={_Asked: lambda asked: asked.key})
def _tags(asked: _Asked) -> list[str]:
    return tags_of(asked.runs, answer=_RECORDS.answer)


@streamlit.cache_data(max_entries=_KEPT, show_spinner=False, hash_funcs={_Asked: lambda asked: asked.key})
def _series(asked: _Asked, tags: tuple[str, ...], by: str) -> pandas.DataFrame:
    return series(asked.runs, tags, by=by, points=_POINTS, answer=_RECORDS.answer)


@streamlit.cache_data(max_entries=_KEPT, show_spinner=False, hash_funcs={_Asked: lambda asked: asked.key})
def _smoothed(asked: _Asked, tags: tuple[str, ...], by: str, share: float) -> pandas.DataFrame:
    if not share:
        return smoothed(_series(asked, tags, by), share)
    every = series(asked.runs, tags, by=by, points=2**31, answer=_RECORDS.answer)
    return curves.thinned(smoothed(every, share), _POINTS)


@streamlit.cache_data(max_entries=_KEPT, show_spinner=False, hash_funcs={_Asked: lambda asked: asked.key})
def _steps(asked: _Asked) -> dict[str, int]:
    found = _RECORDS.answer(asked.runs, "SELECT run, max(step) AS step FROM metrics GROUP BY run")
    return dict(zip(found["run"], map(int, found["step"]), strict=True))


def table_of(runs: Sequence[RunEntry]) -> list[dict[str, Any]]:
    """A row a run."""
    names = names_of(runs)
    return [
        {
            "run": names[run.id],
            "status": run.status,
            "experiment": label(run.experiment),
            "step": run.step,
            "loss": run.results.get("loss/total"),
            "valid loss": run.results.get("valid/loss/total"),
            "tokens/s": run.results.get("throughput/tokens_per_second"),
            "started": datetime.fromtimestamp(run.started, UTC).strftime("%Y-%m-%d %H:%M"),
            "tags": ", ".join(map(label, run.tags)),
            "note": label(run.note),
            "id": run.id,
        }
        for run in runs
    ]
