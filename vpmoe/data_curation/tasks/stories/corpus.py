"""``vpmoe data stories``: a corpus for pretraining, every story another plot; train, valid and test share none.

A row is a pure function of seed and index. Its split is decided by its plot's hash alone, whatever the seed: a plot
that is a test story under one seed is none to train on under another (as long as the shares are the same).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_line
from vpmoe import steps
from vpmoe.data_curation.tasks.family import hash_of
from vpmoe.data_curation.tasks.stories.plots import DEFAULT_SHARES, SPLITS, Shares, number_of, plot, plot_count
from vpmoe.data_curation.tasks.stories.telling import read_first, tell
from vpmoe.errors import DataError
from vpmoe.progress import Progress

VERSION = 10
"""Of what is written: plots, their wording, and what prompts ask of them."""
Row = Mapping[str, Any]


def file_of(split: str) -> str:
    """Name of the file that holds a split's rows."""
    return f"{split}.jsonl"


def make_story(
    seed: int,
    index: int,
    shares: Shares = DEFAULT_SHARES,
    choices: int | None = None,
    readers: float = 0.0,
) -> dict[str, str]:
    """Row ``index`` of the corpus that ``seed`` defines: ``id``, ``text`` and ``split``.

    Args:
        choices: of the world (see ``content``); None: all of it.
        readers: share of the training rows that are first readers instead of stories.

    Raises:
        DataError: there are not so many plots.
    """
    number = number_of(seed, index, choices)
    split = shares.split_of(str(number))
    draw = random.Random(hash_of(f"{seed} {number}"))
    told = plot(number, choices)
    is_reader = split == "train" and hash_of(f"reader {seed} {number}") / 2**64 < readers
    text = read_first(told, draw) if is_reader else tell(told, draw, long=True)
    return {"id": f"{'reader' if is_reader else 'story'}_{seed}_{index:08d}", "text": text, "split": split}


def generate(
    output_dir: Path,
    *,
    rows: int,
    seed: int,
    shares: Shares = DEFAULT_SHARES,
    choices: int | None = None,
    readers: float = 0.0,
    overwrite: bool = False,
    quiet: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl``, unless they are there; returns the rows of each split.

    Raises:
        DataError: no rows, more than there are plots, or shares that are none.
        NotOursError, BusyError: see :func:`vpmoe.steps.run`.
    """
    check_rows(rows, choices)
    shares.check()
    decides = {"rows": rows, "seed": seed, **shares.as_key(), "choices": choices, "readers": readers}

    def make(work: steps.Work) -> dict[str, Any]:
        made = (make_story(seed, index, shares, choices, readers) for index in range(rows))
        return {"rows": write_rows(work.folder, made, rows, "stories", quiet=quiet)}

    step = steps.Step("stories", VERSION, output_dir, decides)
    return steps.run(step, make, overwrite=overwrite, check_hashes=True, say=say)["report"]["rows"]


def check_rows(rows: int, choices: int | None = None) -> None:
    """Refuse a number of rows that cannot be made.

    Raises:
        DataError: none, or more than there are plots.
    """
    count = plot_count(choices)
    if not 1 <= rows <= count:
        raise DataError(f"{rows} rows", source="--rows", remedy=f"ask for 1 to {count:,}")


def write_rows(folder: Path, rows: Iterator[Row], total: int, phase: str, *, quiet: bool) -> dict[str, int]:
    """Write each row to its split's file in ``folder``; returns how many came to each."""
    counts: dict[str, int] = dict.fromkeys(SPLITS, 0)
    with ExitStack() as opened, Progress(phase, total, quiet=quiet) as progress:
        streams = {split: opened.enter_context((folder / file_of(split)).open("w")) for split in SPLITS}
        for row in rows:
            streams[row["split"]].write(json_line(row))
            counts[row["split"]] += 1
            progress.add(1)
    return counts
