"""Documents of a built dataset as runs of text, one kind each, harmless to show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.annotation import NO_RECORD, TEACHER_IDS, TEACHER_LABEL_LOG_P, TEACHER_LOG_P
from megatron_vpmoe.annotation_files import read_records
from megatron_vpmoe.errors import visible
from megatron_vpmoe.manifest import Content
from megatron_vpmoe.token_files import read_triple
from vpmoe.harmony.spans import SPAN_NAMES
from vpmoe.tokenizer.interface import Tokenizer

SPECIAL = "special"
RUN_KINDS = (*SPAN_NAMES, SPECIAL)


@dataclass(frozen=True, slots=True)
class Shown:
    """A document to show.

    Attributes:
        place: its number in the split.
        tokens, supervised: how many.
        runs: ``(kind, text)``; a kind is a span's name, or ``special`` for special tokens.
        judged: of each token with a teacher's record its kind, text and probability, and texts and probabilities of the
            teacher's likeliest.
    """

    place: int
    tokens: int
    supervised: int
    runs: list[tuple[str, str]]
    judged: list[tuple[str, str, float, list[tuple[str, float]]]]


def documents(
    folder: Path,
    manifest: dict[str, Any],
    tokenizer: Tokenizer,
    split: str,
    start: int,
    count: int,
    alternatives: int = 0,
) -> Iterator[Shown]:
    """Documents ``start`` to ``start + count - 1`` of a split, as far as there are so many."""
    first, teacher = 0, Content.model_validate(manifest).teacher
    for shard in manifest["splits"][split]["shards"]:
        wanted = range(max(start, first), min(start + count, first + shard["rows"]))
        if wanted:
            triple = read_triple(folder / split, shard["name"])
            records = None
            if teacher is not None and alternatives:
                records = read_records(folder / split, shard["name"], teacher, triple)
            for place in wanted:
                own = triple.place(place - first)
                supervised = int(triple.lossmask[own].sum())
                shown = runs(tokenizer, triple.tokens[own], triple.span[own])
                said = {} if records is None else records(place - first)
                judged = _judged(tokenizer, triple.tokens[own], triple.span[own], said, alternatives)
                yield Shown(place, own.stop - own.start, supervised, shown, judged)
        first += shard["rows"]


def _judged(
    tokenizer: Tokenizer, tokens: np.ndarray, label_span: np.ndarray, said: dict[str, np.ndarray], count: int
) -> list[tuple[str, str, float, list[tuple[str, float]]]]:
    if not said:
        return []
    ids, log_p, of_label = (said[one.name] for one in (TEACHER_IDS, TEACHER_LOG_P, TEACHER_LABEL_LOG_P))

    def text(token: int) -> str:
        return visible(tokenizer.decode([token]).replace("\n", "\u21b5").replace(" ", "\u00b7"))

    judged = []
    for position in np.flatnonzero(ids[:, 0] != NO_RECORD).tolist():
        token = int(tokens[position + 1])
        kind = SPECIAL if tokenizer.is_special(token) else SPAN_NAMES[label_span[position]]
        p = np.exp(log_p[position, :count]).tolist()
        likeliest = [(text(row), each) for row, each in zip(ids[position, :count].tolist(), p, strict=True)]
        judged.append((kind, text(token), float(np.exp(of_label[position])), likeliest))
    return judged


def runs(
    tokenizer: Tokenizer, tokens: Sequence[int] | np.ndarray, label_span: Sequence[int] | np.ndarray
) -> list[tuple[str, str]]:
    """A document as text, cut where the kind changes; ``label_span[t]`` is the span of token t+1, as it is stored."""
    spans = [0, *(int(span) for span in label_span[:-1])]
    keyed = [
        (SPECIAL if tokenizer.is_special(int(token)) else SPAN_NAMES[span], int(token))
        for token, span in zip(tokens, spans, strict=True)
    ]
    # Runs of one kind are decoded as a whole: a character may be spelled by several tokens.
    return [
        (kind, visible(tokenizer.decode([token for _, token in run])))
        for kind, run in groupby(keyed, key=lambda item: item[0])
    ]
