"""The two ladders of the repository: their files are read, and lead over every rung."""

from __future__ import annotations

from pathlib import Path

import pytest

from vpmoe.ladder.settings import read_ladder
from vpmoe.upcycle.registry import load_registry


@pytest.mark.parametrize("name", ["configs/upcycle/ladder.toml", "configs/nano/ladder/ladder.toml"])
def test_six_rungs_in_their_order(repository: Path, name: str) -> None:
    ladder = read_ladder(repository / name)
    chain = load_registry(repository / ladder.objects).chain(ladder.target)
    assert chain[-1].id == ladder.target
    rungs = [spec.rung for spec in chain if spec.rung]
    assert rungs == sorted(rungs) and set(rungs) == set(range(1, 7))
