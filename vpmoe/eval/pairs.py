"""Preference pairs of a model's own making: the right answer of a row against the wrong one that the model gives.

What is rejected is what the model would say: valid in form, wrong in substance. Questions that it answers rightly,
or in no valid form, give no pair. The split is that of the rows: ``vpmoe data build-pairs --id-field synth_id`` with
the ``--valid-fraction`` that the model's dataset was built with holds out what the model was never trained on, and
``--prompts-of`` that dataset gives the pairs the system message that the model was asked with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_line, sha256_of_file, write_atomically
from vpmoe import steps
from vpmoe.data_curation.datasets.plan import split_of
from vpmoe.data_curation.rows.files import Columns, read_file
from vpmoe.data_curation.tasks.synth_mini import POOL_NAME, check
from vpmoe.errors import DataError
from vpmoe.eval.asking import AsConversation, form_of
from vpmoe.eval.nano import NanoOptions
from vpmoe.eval.open_model import Opened, open_model, require_folder
from vpmoe.eval.questions import Question
from vpmoe.eval.scoring import Scored, answer

PAIRS_NAME = "pairs.jsonl"


def make_pairs(
    where: Path,
    rows: Path,
    output_dir: Path,
    *,
    counts: dict[str, int],
    valid_fraction: float,
    options: NanoOptions,
    overwrite: bool = False,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Write ``pairs.jsonl`` (id, prompt, chosen, rejected), unless it is there; returns how many of what.

    Args:
        where: as :func:`vpmoe.eval.open_model.open_model` takes it.
        rows: folder of ``vpmoe data synth-mini``.
        output_dir: the folder to make.
        counts: questions to ask of each split, the first of the rows.
        valid_fraction: what decides the split, with the row's id.
        options: ``max_new_tokens``, ``batch_size``, ``system`` and ``developer`` of them.

    Raises:
        CheckpointError, DataError: something named does not exist or has too few rows.
        HarmonyError: the model's vocabulary knows no conversations.
        NotOursError, BusyError: see :func:`vpmoe.steps.run`.
    """
    require_folder(where)
    questions = questions_of(rows / POOL_NAME, counts, valid_fraction)
    with open_model(where) as opened:
        form = form_of(opened, plain=False, system=options.system, developer=options.developer, say=say)
        step = steps.Step(
            "own_pairs",
            1,
            output_dir,
            {
                "weights": opened.entry["weights_sha256"],
                "rows": sha256_of_file(rows / POOL_NAME),
                "questions": counts,
                "valid_fraction": valid_fraction,
                "asked": form.entry,
                "max_new_tokens": options.max_new_tokens,
            },
            packages=("torch",),
        )

        def make(work: steps.Work) -> dict[str, Any]:
            return _write(work.folder / PAIRS_NAME, questions, opened, form, options)

        return steps.run(step, make, overwrite=overwrite, check_hashes=True, say=say)["report"]


def _write(path: Path, questions: list[Question], opened: Opened, form: Any, options: NanoOptions) -> dict[str, Any]:
    if not isinstance(form, AsConversation):
        raise DataError("this model is no conversation's", source=str(opened.path), remedy="name one of Harmony data")
    scored = answer(
        opened.model, form, questions, check, max_new_tokens=options.max_new_tokens, batch_size=options.batch_size
    )
    pairs = pairs_of(scored)
    write_atomically(path, "".join(map(json_line, pairs)).encode())
    return {
        "questions": len(scored),
        "right": sum(one.exact for one in scored),
        "invalid": sum(not one.judgement.valid for one in scored),
        "pairs": len(pairs),
    }


def pairs_of(scored: Iterable[Scored]) -> list[dict[str, Any]]:
    """Rows for ``vpmoe data build-pairs``, of the answers that are valid and not exact."""

    def answered(thinking: str | None, content: str | None) -> list[dict[str, Any]]:
        return [{"role": "assistant", "thinking": thinking, "content": content}]

    return [
        {
            "synth_id": one.question.row["synth_id"],
            "prompt": one.question.query,
            "chosen": answered(one.question.row["synthetic_reasoning"], one.question.row["synthetic_answer"]),
            "rejected": answered(one.judgement.analysis, one.judgement.final),
        }
        for one in scored
        if one.judgement.valid and not one.exact
    ]


def questions_of(path: Path, counts: dict[str, int], valid_fraction: float) -> list[Question]:
    """The first so many questions of each split of the rows at ``path``.

    Raises:
        DataError: there are no rows, or fewer.
    """
    if not path.is_file():
        raise DataError("there are no rows here", source=str(path), remedy="make them: vpmoe data synth-mini")
    of_split: dict[str, list[Question]] = {split: [] for split in counts}
    needed = ("synth_id", "exercise", "query", "synthetic_reasoning", "synthetic_answer")
    for _, row, _ in read_file(path, path.name, Columns(needed)):
        if isinstance(row, Exception):
            raise row
        of_split[split_of(row["synth_id"], valid_fraction)].append(Question(dict(row)))
    for split, count in counts.items():
        if len(of_split[split]) < count:
            raise DataError(
                f"{count} questions of the split {split!r}, which has {len(of_split[split])}",
                source=str(path),
                remedy="ask for fewer, or make more rows",
            )
    return [question for split, count in counts.items() for question in islice(of_split[split], count)]
