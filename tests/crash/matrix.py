"""Every phase of a run times who is killed in it; and kills at random moments. ``python -m tests.crash --help``."""

from __future__ import annotations

import random
import shutil
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.crash.journey import Broken, Journey, straight_run
from tests.crash.phases import BEGUN, PHASES, SAMPLED, SMALL, Phase
from tests.crash.points import Point
from tests.fixtures_dataset import small_dataset

AT_RANDOM = "random moment"
_WHO = {"all": (0, 1), "rank 0": (0,), "rank 1": (1,)}
_CALLS = "open|rename|remove|rmdir|mkdir|fsync"


@dataclass(frozen=True)
class Cell:
    """One kill.

    Args:
        phase: None: at a random moment.
        processes: 1 or 2.
        who: "all", or the one that is killed of two.
        seed: of the random moment.
    """

    phase: Phase | None
    processes: int
    who: str
    seed: int = 0

    @property
    def name(self) -> str:
        return AT_RANDOM if self.phase is None else self.phase.name

    @property
    def sampled(self) -> bool:
        """Whether it is of the run on its own answers."""
        return self.phase.sampled if self.phase else self.seed % 4 == 3

    @property
    def begun(self) -> bool:
        """Whether the run has checkpoints already."""
        return not self.sampled and (self.phase is not None or self.seed % 2 == 0)

    @property
    def victims(self) -> tuple[int, ...]:
        return (0,) if self.processes == 1 else _WHO[self.who]

    def kill(self, journey: Journey) -> None:
        """Do it."""
        if self.phase is not None:
            of = 0 if self.phase.leads or 0 in self.victims else 1
            beside = self.phase.beside or self.processes > 1
            journey.kill(self.phase.points, of=of, victims=self.victims, async_save=beside)
            return
        draw = random.Random(self.seed)
        if draw.random() < 0.5:
            journey.kill_after(draw.uniform(0, 6.0 * self.processes), victims=self.victims)
        else:
            point = Point(_CALLS, f"^{journey.run_dir}/", count=draw.randint(1, 250))
            journey.kill((point,), of=0, victims=self.victims, or_end=True)


def cells(*, rounds: int, seed: int) -> list[Cell]:
    """The whole matrix, then ``rounds`` kills at random moments."""
    whom = [(1, "all"), *((2, who) for who in _WHO)]
    draw = random.Random(seed)
    drawn = [(draw.randrange(2**31), *draw.choice(whom)) for _ in range(rounds)]
    return [
        *(Cell(phase, processes, who) for phase in PHASES for processes, who in whom),
        *(Cell(None, processes, who, seed) for seed, processes, who in drawn),
    ]


@dataclass
class Laboratory:
    """A folder with what all journeys share: the dataset and the straight runs, each made when it is first needed."""

    folder: Path
    _straight: dict[tuple[int, bool], Path] = field(default_factory=dict)
    _begun: dict[int, Path] = field(default_factory=dict)

    def journey(
        self, name: str, processes: int, *, sampled: bool = False, begun: bool = False, folder: Path | None = None
    ) -> Journey:
        """A new one.

        Args:
            name: of its folder.
            processes: of the run.
            sampled: the run on its own answers.
            begun: one that has been killed already, and has checkpoints.
            folder: in place of ``folder/name``.
        """
        dataset = self.folder / "dataset"
        if not dataset.exists():
            small_dataset(dataset, train=64, valid=4)
        fields: Mapping[str, Any] = SAMPLED if sampled else SMALL
        if (processes, sampled) not in self._straight:
            place = self.folder / f"straight_{processes}{'_sampled' * sampled}"
            place.mkdir(parents=True)
            self._straight[processes, sampled] = straight_run(place, dataset, processes, fields)
        if begun and processes not in self._begun:
            first = self.journey(f"begun_{processes}", processes)
            first.kill(BEGUN, of=0, victims=range(processes))
            self._begun[processes] = first.run_dir
        place = folder or self.folder / name
        place.mkdir(parents=True)
        other = self._begun[processes] if begun else None
        return Journey(place, self._straight[processes, sampled], dataset, processes, fields, other)


def run_matrix(chosen: Iterable[Cell], folder: Path, tell: Callable[[Cell, str, float, Path], None]) -> bool:
    """Each cell in a run of its own.

    Args:
        chosen: what to do.
        folder: for runs; those that fail stay.
        tell: is given the cell, "ok" or what was wrong, the seconds, and where the run lies.

    Returns:
        whether all went well.
    """
    laboratory, good = Laboratory(folder), True
    for number, cell in enumerate(chosen):
        began, outcome = time.monotonic(), "ok"
        place = folder / f"cell_{number:04d}"
        try:
            journey = laboratory.journey(place.name, cell.processes, sampled=cell.sampled, begun=cell.begun)
            cell.kill(journey)
            journey.finish()
        except Broken as broken:
            outcome, good = str(broken), False
        else:
            shutil.rmtree(place)
        tell(cell, outcome, time.monotonic() - began, place)
    return good
