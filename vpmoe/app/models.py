"""Models for the pages: which there are, and those that are open. One is opened once and kept for all sessions, until
other weights lie at its path; it computes for one session at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import streamlit

from vpmoe.app.places import Places
from vpmoe.app.shown import distinct, label, path_label
from vpmoe.errors import DataError
from vpmoe.runs.registry import RunEntry, checkpoints_of

if TYPE_CHECKING:
    from vpmoe.eval.open_model import Opened

BESIDE = ("One", "Two side by side", "Three side by side")
"""How many models a page shows; as many as may be are kept open."""
_SIGNS = ("config.json", "files.json", "megatron/files.json", "checkpoints")


@dataclass(frozen=True)
class Choice:
    """A model to choose: ``label``, and the path that it is opened by."""

    label: str
    path: Path


@dataclass
class Held:
    """An open model, and who may use it."""

    opened: Opened
    lock: threading.Lock = field(default_factory=threading.Lock)

    @contextmanager
    def used(self) -> Iterator[Opened]:
        """For one session at a time."""
        with self.lock:
            yield self.opened


def choices(places: Places, runs: Sequence[RunEntry]) -> list[Choice]:
    """What can be opened: of each run the newest checkpoint, then each on its own, then what the command was given."""
    found = []
    for run, name in zip(runs, distinct([run.name for run in runs], [run.id for run in runs]), strict=True):
        saved = checkpoints_of(run.directory)
        if saved:
            found.append(Choice(f"{name}, newest checkpoint", run.directory))
            found += [Choice(f"{name}, {label(path.name)}", path) for path in saved]
    return [*(Choice(path_label(str(path)), path) for path in places.models), *found]


def stamp_of(path: Path) -> float:
    """When what lies at the path last changed: other weights there are another model.

    Raises:
        DataError: there is no such folder.
    """
    if not path.is_dir():
        raise DataError("there is no such folder", source=str(path), remedy="name a run, a checkpoint or a model")
    there = [path, *(path / sign for sign in _SIGNS)]
    return max(one.stat().st_mtime for one in there if one.exists())


def held(path: Path) -> Held:
    """The open model at ``path``; raises as :func:`vpmoe.eval.open_model.open_model` does."""
    return _open(str(path), stamp_of(path))


@streamlit.cache_resource(max_entries=len(BESIDE), show_spinner="Opening the model …")
def _open(path: str, stamp: float) -> Held:
    from vpmoe.eval.open_model import open_model

    _groups()
    with _OPENING, open_model(Path(path)) as opened:
        _ = opened.model  # its weights are read here, once
        return Held(opened)


_OPENING = threading.Lock()


@streamlit.cache_resource(show_spinner=False)
def _groups() -> ExitStack:
    """Process groups that stay until the server ends: a model that is kept needs them."""
    from vpmoe.weights.geometry import process_groups

    kept = ExitStack()
    kept.enter_context(process_groups())
    return kept


def _pick(places: Places, runs: Sequence[RunEntry], *, key: str, title: str, index: int) -> Path | None:
    """Let the user choose one; any other path may be typed. None where there is none and none is typed."""
    offered = {str(choice.path): choice.label for choice in choices(places, runs)}
    chosen = streamlit.selectbox(
        title,
        [*offered],
        index=min(index, len(offered) - 1) if offered else None,
        format_func=lambda path: offered.get(path, path_label(path)),
        accept_new_options=True,
        placeholder="a run, a checkpoint, an object of a ladder or an HF directory",
        key=key,
        persist_state="session",
        help="Runs of the store, what the command was given, or the path of any other: type it.",
    )
    return Path(chosen) if chosen else None


def pick_beside(places: Places, runs: Sequence[RunEntry], *, key: str) -> list[Path | None]:
    """Let the user choose one model or several to stand side by side; None in the place of one that is not chosen."""
    chosen = streamlit.segmented_control(
        "Models", BESIDE, default=BESIDE[0], required=True, key=f"{key}_beside", persist_state="session"
    )
    found = []
    for number, column in enumerate(columns := streamlit.columns(BESIDE.index(chosen) + 1)):
        with column:
            title = f"Model {number + 1}" if len(columns) > 1 else "Model"
            found.append(_pick(places, runs, key=f"{key}_model_{number}", title=title, index=number))
    return found
