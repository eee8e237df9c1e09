"""Documents of a built dataset as runs of text, one kind each, harmless to show."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.errors import visible
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
    """

    place: int
    tokens: int
    supervised: int
    runs: list[tuple[str, str]]


def documents(
    folder: Path, manifest: dict[str, Any], tokenizer: Tokenizer, split: str, start: int, count: int
) -> Iterator[Shown]:
    """Documents ``start`` to ``start + count - 1`` of a split, as far as there are so many."""
    first = 0
    for shard in manifest["splits"][split]["shards"]:
        wanted = range(max(start, first), min(start + count, first + shard["rows"]))
        if wanted:
            triple = read_triple(folder / split, shard["name"])
            for place in wanted:
                own = triple.place(place - first)
                supervised = int(triple.lossmask[own].sum())
                shown = runs(tokenizer, triple.tokens[own], triple.span[own])
                yield Shown(place, own.stop - own.start, supervised, shown)
        first += shard["rows"]


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
