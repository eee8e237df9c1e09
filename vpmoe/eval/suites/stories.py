"""Stories to order: how often a story has the words that its prompt asks for, its protagonist, and no banned word.

Each prompt gets one story, whose draws are a function of the prompt and the seed alone. What counts is the story as far
as it was written; whether it ended by itself is told apart (``validity``). Beside each share stands ``by_chance``: what
the same stories give against the constraints of the prompt behind theirs, which nobody asked them for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from megatron_vpmoe.files import sha256_of_file
from vpmoe.data_curation.rows.source import resolve
from vpmoe.data_curation.tasks.stories.checker import Constraints, StoryCheck, check_story
from vpmoe.errors import DataError
from vpmoe.eval.asking import Form, decode_in_batches, form_of
from vpmoe.eval.conversation import Answer
from vpmoe.eval.open_model import open_model, require_folder
from vpmoe.eval.suites import suite_report

SUITE, VERSION = "stories", 3
"""The version is of what is asked and reported; decides whether a keyed step's evaluation is done."""
STORY, REQUIRED, PROTAGONIST, BANNED = "story", "required_words", "protagonist", "no_banned_words"
_REMEDY = "make them: vpmoe data story-prompts"
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to ask, and how.

    Attributes:
        prompts: rows of ``vpmoe data story-prompts``.
        split: of them.
        limit: so many of the first; None: all.
        passage: ask in plain text that is to be gone on with, as of a model that knows no conversations.
        temperature, top_p, seed: of the draw; temperature 0 is greedy.
        max_new_tokens: a longer story is cut.
        batch_size: stories that a process writes at once.
        samples: stories kept in the report.
        bf16: compute in bfloat16 or not; None: as the run did.
        output: the report; None: ``reports/eval/stories/<checkpoint>.json``.
        overwrite: replace a finished report.
        quiet: no progress bar.
    """

    prompts: Path
    split: str = "test"
    limit: int | None = None
    passage: bool = False
    temperature: float = 0.8
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int = 256
    batch_size: int = 64
    samples: int = 8
    bf16: bool | None = None
    output: Path | None = None
    overwrite: bool = False
    quiet: bool = False


@dataclass(frozen=True)
class Request:
    """A row: its id, what the user says, and what the story is held to."""

    id: str
    prompt: str
    constraints: Constraints


def evaluate(path: Path, asked: Asked, *, say: Say) -> dict[str, Any]:
    """Ask the model at ``path``, write report and items, return the report; a collective of all ranks.

    Raises:
        CheckpointError, DataError, TokenizerError: something named does not exist or does not fit.
        NotOursError: something else lies where the report belongs.
    """
    from megatron_vpmoe.generation.sampling import SamplingOptions

    started = time.perf_counter()
    require_folder(path)
    requests = read_requests(asked.prompts, asked.split, asked.limit)
    with open_model(path, bf16=asked.bf16) as opened:
        output = suite_report.output_for(SUITE, opened, asked.output, overwrite=asked.overwrite)
        form = form_of(opened, plain=False, passage=asked.passage, system=None, developer=None, say=say)
        prompts = [form.prompt(request.prompt) for request in requests]
        context = opened.context
        if context is not None and (longest := max(map(len, prompts))) >= context:
            raise DataError(
                f"a prompt has {longest:,} tokens, and the model was trained on {context:,}",
                source=str(asked.prompts),
                remedy="ask shorter prompts",
            )
        draw = {"temperature": asked.temperature, "top_p": asked.top_p, "seed": asked.seed}
        sampling = SamplingOptions(asked.max_new_tokens, form.stop_ids, **draw)
        label = None if asked.quiet else SUITE
        written = decode_in_batches(opened.model, prompts, sampling, asked.batch_size, label=label, context=context)
        items = [item for request, ids in zip(requests, written, strict=True) for item in items_of(request, ids, form)]
        report = {
            **suite_report.head(SUITE, opened, _settings_entry(asked, len(requests))),
            "asked": form.entry,
            "tasks": with_chance(entries_of(items), requests, items),
            "wall_seconds": round(time.perf_counter() - started, 2),
            "samples": _samples(requests, items, asked.samples),
        }
        suite_report.write(output, report, items)
    say(f"{output} written")
    return report


def read_requests(path: Path, split: str, limit: int | None) -> list[Request]:
    """The rows of a split, or the first of them.

    Raises:
        DataError: no rows there, one that asks for no story, or none of that split.
    """
    requests = list(islice(_requests(path, split), limit))
    if not requests:
        raise DataError(f"no prompt of the split {split!r}", source=str(path), remedy=_REMEDY)
    return requests


def _requests(path: Path, split: str) -> Iterator[Request]:
    columns = ("id", "split", "prompt", "constraints")
    for place, row in resolve(str(path)).rows(columns):
        if missing := [name for name in columns[:3] if not isinstance(row.get(name), str)]:
            raise DataError(f"the row has no text in {', '.join(missing)}", source=place, remedy=_REMEDY)
        if row["split"] == split:
            yield Request(row["id"], row["prompt"], Constraints.of_row(row.get("constraints") or {}, place))


def items_of(request: Request, ids: Sequence[int], form: Form) -> Iterator[dict[str, Any]]:
    """A line for the story, and one for each thing that it is held to and that was asked for."""
    answer = Answer(form)
    for token in ids:
        answer.take(token)
    answer.close()
    story = answer.final.strip()
    found = check_story(story, request.constraints)
    ended = bool(story) and ids[-1] in form.stop_ids
    yield {"task": STORY, "item": request.id, "valid": ended, "tokens": len(ids), "answer": story}
    details = {REQUIRED: {"missing": list(found.missing)}, BANNED: {"banned": list(found.banned_present)}}
    for task, kept in _kept(found, request.constraints).items():
        yield {"task": task, "item": request.id, "correct": kept, **details.get(task, {})}


def _kept(found: StoryCheck, asked: Constraints) -> dict[str, bool]:
    """Of each thing that was asked for, whether the story keeps to it."""
    kept = {PROTAGONIST: found.protagonist_right}
    if asked.required:
        kept[REQUIRED] = found.required_present
    if asked.banned:
        kept[BANNED] = not found.banned_present
    return kept


def entries_of(items: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The tasks of the report: shares in 0..1 with their 95 % intervals; of required words a story is to have all."""
    stories = [item for item in items if item["task"] == STORY]
    ended = sum(item["valid"] for item in stories)
    entries: dict[str, dict[str, Any]] = {
        STORY: {
            "n": len(stories),
            "validity": ended / len(stories),
            "interval": suite_report.wilson(ended, len(stories)),
            "mean_tokens": float(mean(item["tokens"] for item in stories)),
        }
    }
    for task in (REQUIRED, PROTAGONIST, BANNED):
        if mine := [item["correct"] for item in items if item["task"] == task]:
            right = sum(mine)
            entries[task] = {
                "n": len(mine),
                "accuracy": right / len(mine),
                "interval": suite_report.wilson(right, len(mine)),
                "right": right,
            }
    return entries


def with_chance(
    entries: Mapping[str, dict[str, Any]], requests: Sequence[Request], items: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, Any]]:
    """The entries with ``by_chance``, where there are several prompts: each story held to what the next one asks."""
    if len(requests) == 1:
        return dict(entries)
    kept: dict[str, list[bool]] = {}
    stories = [item["answer"] for item in items if item["task"] == STORY]
    for story, other in zip(stories, [*requests[1:], *requests[:1]], strict=True):
        for task, right in _kept(check_story(story, other.constraints), other.constraints).items():
            kept.setdefault(task, []).append(right)
    return {name: entry | ({"by_chance": mean(kept[name])} if name in kept else {}) for name, entry in entries.items()}


def _samples(requests: Sequence[Request], items: Sequence[Mapping[str, Any]], count: int) -> list[dict[str, Any]]:
    """The first stories, each with its prompt and what it does not keep to."""
    broken: dict[str, list[str]] = {}
    for item in items:
        if not item.get("correct", True):
            broken.setdefault(item["item"], []).append(item["task"])
    stories = [item for item in items if item["task"] == STORY]
    return [
        {
            "prompt": request.prompt,
            "story": item["answer"],
            "ended": item["valid"],
            "broken": broken.get(request.id, []),
        }
        for request, item in list(zip(requests, stories, strict=True))[:count]
    ]


def _settings_entry(asked: Asked, count: int) -> dict[str, Any]:
    """What decides the numbers; how a model is asked is told beside it, as a conversation compares with plain text."""
    decides = ("split", "temperature", "top_p", "seed", "max_new_tokens", "batch_size", "samples")
    return {
        "questions": str(asked.prompts),
        "sha256": sha256_of_file(asked.prompts),
        "prompts": count,
        **{name: getattr(asked, name) for name in decides},
    }


def summary_lines(report: Mapping[str, Any]) -> str:
    """The report as a few lines."""
    lines = []
    for name, entry in report["tasks"].items():
        low, high = entry["interval"]
        share, what = (entry["accuracy"], "right") if "accuracy" in entry else (entry["validity"], "ended")
        chance = f"; by chance {100 * entry['by_chance']:.1f} %" if "by_chance" in entry else ""
        lines.append(
            f"{name:<16}{what} {100 * share:5.1f} % [{100 * low:.1f}, {100 * high:.1f}], n {entry['n']}{chance}"
        )
    return "\n".join([*lines, f"{report['checkpoint']['run']}, {report['wall_seconds']:.1f} s"])
