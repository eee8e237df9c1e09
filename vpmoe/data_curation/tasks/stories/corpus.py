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
from vpmoe.data_curation.tasks.stories.plots import SPLITS, check_fractions, number_of, plot, plot_count, split_of
from vpmoe.data_curation.tasks.stories.telling import tell
from vpmoe.errors import DataError
from vpmoe.progress import Progress

VALID_FRACTION, TEST_FRACTION = 0.02, 0.02
VERSION = 3
"""Of what is written: plots, their wording, and what prompts ask of them."""
Row = Mapping[str, Any]


def file_of(split: str) -> str:
    """Name of the file that holds a split's rows."""
    return f"{split}.jsonl"


def make_story(
    seed: int, index: int, valid_fraction: float = VALID_FRACTION, test_fraction: float = TEST_FRACTION
) -> dict[str, str]:
    """Row ``index`` of the corpus that ``seed`` defines: ``id``, ``text`` and ``split``.

    Raises:
        DataError: there are not so many plots.
    """
    number = number_of(seed, index)
    return {
        "id": f"story_{seed}_{index:08d}",
        "text": tell(plot(number), random.Random(hash_of(f"{seed} {number}")), long=True),
        "split": split_of(str(number), valid_fraction, test_fraction),
    }


def generate(
    output_dir: Path,
    *,
    rows: int,
    seed: int,
    valid_fraction: float = VALID_FRACTION,
    test_fraction: float = TEST_FRACTION,
    overwrite: bool = False,
    quiet: bool = True,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, int]:
    """Write ``train.jsonl``, ``valid.jsonl`` and ``test.jsonl``, unless they are there; returns the rows of each split.

    Raises:
        DataError: no rows, more than there are plots, or shares that are none.
        NotOursError, BusyError: see :func:`vpmoe.steps.run`.
    """
    check_rows(rows)
    check_fractions(valid_fraction, test_fraction)
    decides = {"rows": rows, "seed": seed, "valid_fraction": valid_fraction, "test_fraction": test_fraction}

    def make(work: steps.Work) -> dict[str, Any]:
        made = (make_story(seed, index, valid_fraction, test_fraction) for index in range(rows))
        return {"rows": write_rows(work.folder, made, rows, "stories", quiet=quiet)}

    step = steps.Step("stories", VERSION, output_dir, decides)
    return steps.run(step, make, overwrite=overwrite, check_hashes=True, say=say)["report"]["rows"]


def check_rows(rows: int) -> None:
    """Refuse a number of rows that cannot be made.

    Raises:
        DataError: none, or more than there are plots.
    """
    if not 1 <= rows <= plot_count():
        raise DataError(f"{rows} rows", source="--rows", remedy=f"ask for 1 to {plot_count():,}")


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
