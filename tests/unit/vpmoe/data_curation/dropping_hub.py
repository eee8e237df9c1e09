"""A stand-in for the hub whose connection breaks."""

import random
from collections.abc import Iterator
from pathlib import Path

import datasets

_LOAD = datasets.load_dataset


class Hub:
    """Stands for the hub: the files as a stream that breaks at random places."""

    def __init__(self, folder: Path, chance: float, seed: int = 0) -> None:
        self.folder, self.chance, self.draw, self.drops = folder, chance, random.Random(seed), 0

    def load_dataset(self, *_: object, **__: object) -> "_Stream":
        self.drop_perhaps()
        paths = [str(path) for path in sorted(self.folder.glob("*.parquet"))]
        return _Stream(self, _LOAD("parquet", data_files=paths, split="train", streaming=True))

    def drop_perhaps(self) -> None:
        if self.draw.random() < self.chance:
            self.drops += 1
            raise ConnectionResetError("the line dropped")


class _Stream:
    def __init__(self, hub: Hub, rows: datasets.IterableDataset) -> None:
        self.hub, self.rows = hub, rows
        self.column_names = rows.column_names
        self.state_dict, self.load_state_dict = rows.state_dict, rows.load_state_dict

    def select_columns(self, names: list[str]) -> "_Stream":
        return _Stream(self.hub, self.rows.select_columns(names))

    def __iter__(self) -> Iterator[dict]:
        for row in self.rows:
            self.hub.drop_perhaps()
            yield row
