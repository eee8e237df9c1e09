"""The families by name."""

from __future__ import annotations

from vpmoe.data_curation.tasks.arithmetic import LONG_ADDITION, MULTIPLICATION
from vpmoe.data_curation.tasks.counting import COUNTING
from vpmoe.data_curation.tasks.dates import DATES
from vpmoe.data_curation.tasks.digits import ADDITION, MAXIMUM, SORTING, SUBTRACTION
from vpmoe.data_curation.tasks.family import Family
from vpmoe.data_curation.tasks.lookup import LOOKUP
from vpmoe.data_curation.tasks.puzzles import PUZZLES
from vpmoe.data_curation.tasks.strings import STRINGS
from vpmoe.data_curation.tasks.units import UNITS

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
