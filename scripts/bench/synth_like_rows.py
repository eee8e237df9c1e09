"""Row sources for benchmarks: generated rows of SYNTH's lengths, and rows of a path several times over."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from vpmoe.data_curation.conversations.synth import resolve_synth
from vpmoe.data_curation.rows.files import Row
from vpmoe.data_curation.rows.source import RowStream

# Mean and deviation of the logarithm of the characters of each field, of 700 rows of SYNTH.
FIELD_LENGTHS = {"query": (5.08, 0.60), "synthetic_reasoning": (7.45, 0.62), "synthetic_answer": (7.12, 0.50)}
COMMON_WORDS = """
    the of and to in is that for it as was with be by on not he his but at are this have from or had an they which
    one you were all her she there would their we him been has when who will no more if out so up said what its
    about than into them can only other time new some could these two may first then do any like my now over such
    our man me even most made after also did many off before must well back through years much where your way down
    should because long each just state people those too mr how little good world make very year still see own work
    men day get here old life both between being under three never know same last another while us might great go
    come since against right came take used himself few house use place during high without again home around small
    however found general question answer therefore evidence period region century museum equation temperature
    population economic théorie número größe história analyse określić città données système verifies hypothesis
    molecular boundary coefficient
""".split()  # noqa: SIM905
SYLLABLES = """
    ba ce di fo gu han jer kil lom nus pra que rist sol tan vex wyn zor mint ler atio ment ous ing ely
""".split()  # noqa: SIM905


@dataclass(frozen=True)
class GeneratedRows:
    """A row source that makes ``rows`` SYNTH-like rows of realistic lengths, a pure function of the count."""

    count: int
    name: str = "generated"
    path = hub_id = None

    def rows(self) -> Iterator[tuple[str, Row]]:
        """``(place, row)``."""
        draw = random.Random(0)
        sentences = [_sentence(draw) for _ in range(20_000)]
        for index in range(self.count):
            row = {"synth_id": f"generated_{index:08d}", "language": "en"}
            for field, (mean, deviation) in FIELD_LENGTHS.items():
                row[field] = _text(draw, sentences, math.exp(draw.gauss(mean, deviation)))
            yield f"generated:{index}", row

    def open(self, *_: object, **__: object) -> RowStream:
        """All rows; benchmarks are not gone on with."""
        return _Straight(self.rows())

    def total_rows(self) -> int:
        """All of them."""
        return self.count

    def identity(self) -> dict[str, Any]:
        """What decides the rows."""
        return {"generated": self.count}

    def as_manifest(self) -> dict[str, Any]:
        """The source as a manifest records it."""
        return {"name": self.name, "hub_id": None, "revision": None, "files": []}


@dataclass(frozen=True)
class RepeatedRows:
    """The rows of a path, several times over."""

    rows_path: str
    copies: int
    path = hub_id = None
    name: str = "repeated"

    def rows(self) -> Iterator[tuple[str, Row]]:
        """``(place, row)``; ids of later copies are told apart."""
        for copy in range(self.copies):
            for place, row in resolve_synth(self.rows_path).rows():
                yield f"{place}#{copy}", {**row, "synth_id": f"{row['synth_id']}_{copy}"}

    def open(self, *_: object, **__: object) -> RowStream:
        """All rows; benchmarks are not gone on with."""
        return _Straight(self.rows())

    def total_rows(self) -> int | None:
        """Rows of all copies, where the files say it."""
        once = resolve_synth(self.rows_path).total_rows()
        return None if once is None else once * self.copies

    def identity(self) -> dict[str, Any]:
        """What decides the rows."""
        return {"copies": self.copies, **resolve_synth(self.rows_path).identity()}

    def as_manifest(self) -> dict[str, Any]:
        """The source as a manifest records it."""
        return resolve_synth(self.rows_path).as_manifest()


@dataclass(frozen=True)
class _Straight:
    source: Iterator[tuple[str, Row]]

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        return self.source

    def cursor(self) -> dict[str, Any]:
        return {}


def _sentence(draw: random.Random) -> str:
    words = []
    for _ in range(draw.randint(6, 22)):
        kind = draw.random()
        if kind < 0.88:
            words.append(COMMON_WORDS[min(int(draw.expovariate(0.02)), len(COMMON_WORDS) - 1)])
        elif kind < 0.96:
            words.append("".join(draw.choices(SYLLABLES, k=draw.randint(2, 4))))
        else:
            words.append(str(draw.randint(1, 2100)))
        if draw.random() < 0.07:
            words[-1] += ","
    return " ".join(words).capitalize() + draw.choice((". ", ". ", "? ", ".\n\n", " → ", ":\n- "))


def _text(draw: random.Random, sentences: list[str], characters: float) -> str:
    chosen, length = [], 0
    while length < characters:
        chosen.append(draw.choice(sentences))
        length += len(chosen[-1])
    return "".join(chosen).strip()
