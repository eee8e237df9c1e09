"""The families by name."""

from __future__ import annotations

from vpmoe.data_curation.mini.arithmetic import LONG_ADDITION, MULTIPLICATION
from vpmoe.data_curation.mini.counting import COUNTING
from vpmoe.data_curation.mini.dates import DATES
from vpmoe.data_curation.mini.digits import ADDITION, MAXIMUM, SORTING, SUBTRACTION
from vpmoe.data_curation.mini.family import Family
from vpmoe.data_curation.mini.lookup import LOOKUP
from vpmoe.data_curation.mini.puzzles import PUZZLES
from vpmoe.data_curation.mini.strings import STRINGS
from vpmoe.data_curation.mini.units import UNITS

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        ADDITION,
        SUBTRACTION,
        MULTIPLICATION,
        LONG_ADDITION,
        MAXIMUM,
        SORTING,
        COUNTING,
        UNITS,
        DATES,
        STRINGS,
        LOOKUP,
        PUZZLES,
    )
}
