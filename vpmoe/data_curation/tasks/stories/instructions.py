"""``vpmoe data story-prompts``: files of prompts with stories, or pairs; by the templates or by a served model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_bytes, write_atomically
from vpmoe import steps
from vpmoe.data_curation.tasks.stories.checker import Constraints
from vpmoe.data_curation.tasks.stories.corpus import VERSION, Row, check_rows, write_rows
from vpmoe.data_curation.tasks.stories.endpoint import Answers
from vpmoe.data_curation.tasks.stories.plots import DEFAULT_SHARES, Shares
from vpmoe.data_curation.tasks.stories.prompts import Asked, ask, make_pair, make_prompt, other_hero, row_of
from vpmoe.data_curation.tasks.stories.writing import Told, Writing, write_stories
from vpmoe.errors import DataError

DROPPED = "dropped.json"
"""The rows for which a model wrote no story that keeps to what was asked."""


def generate(
    output_dir: Path,
    *,
    rows: int,
    seed: int,
    pairs: bool = False,
    shares: Shares = DEFAULT_SHARES,
    choices: int | None = None,
    slips: float = 0.0,
    writing: Writing | None = None,
    overwrite: bool = False,
    quiet: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Write instructions, or pairs, unless they are there.

    Args:
        slips: of instructions by the templates, see :func:`prompts.make_prompt`.
        writing: a served model writes the stories, and what it answers is kept in :func:`answers_of`; None: the
            templates do.

    Returns:
        The report: ``rows`` of each split, and where a model wrote, :meth:`writing.Told.report` as ``written``.

    Raises:
        DataError: no rows, more than there are plots, shares that are none; no story of a model kept to what was asked.
        EndpointError: the model cannot be asked; the same command goes on behind what it answered.
        NotOursError, BusyError: see :func:`vpmoe.steps.run`.
    """
    check_rows(rows, choices)
    shares.check()
    decides: dict[str, Any] = {"rows": rows, "seed": seed, "pairs": pairs, "choices": choices, "slips": slips}
    decides |= shares.as_key()
    decides |= {"writing": writing.as_key()} if writing else {}
    make_row = make_pair if pairs else partial(make_prompt, slips=slips)

    def templates() -> Iterator[Row]:
        return (make_row(seed, index, shares, choices) for index in range(rows))

    def written(told: Told) -> Iterator[Row]:
        for index, stories in enumerate(told.stories):
            if stories is not None:
                yield row_of(ask(seed, index, choices), seed, index, stories, shares)

    def make(work: steps.Work) -> dict[str, Any]:
        if writing is None:
            return {"rows": write_rows(work.folder, templates(), rows, "prompts", quiet=quiet)}
        path, wrong = answers_of(output_dir), _of_other_hero if pairs else None
        told = write_stories(
            rows, lambda index: ask(seed, index, choices), writing, Answers(path), wrong_of=wrong, quiet=quiet
        )
        if len(told.dropped) == rows:
            raise DataError(
                f"none of {rows} rows got a story that keeps to what was asked: {told.report()['dropped']}",
                source=f"{writing.endpoint.model}; its answers are in {path}",
                remedy="name a model that follows instructions better, or leave --writer out",
            )
        write_atomically(work.folder / DROPPED, json_bytes(told.dropped))
        counts = write_rows(work.folder, written(told), rows - len(told.dropped), "rows", quiet=True)
        return {"rows": counts, "written": told.report()}

    step = steps.Step("story_prompts", VERSION, output_dir, decides)
    return steps.run(step, make, overwrite=overwrite, check_hashes=True, say=say)["report"]


def answers_of(output_dir: Path) -> Path:
    """Where the answers that a model gave for an output are kept."""
    return output_dir.with_name(f"{output_dir.name}.answers.jsonl")


def _of_other_hero(asked: Asked) -> Constraints:
    other = other_hero(asked)
    return replace(asked.constraints, name=other.name, kind=other.kind)
