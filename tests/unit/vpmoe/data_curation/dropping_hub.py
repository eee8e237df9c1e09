"""A stand-in for the hub whose connection breaks."""

import random
from collections.abc import Iterator
from pathlib import Path

import datasets

_BUILDER = datasets.load_dataset_builder
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # local files too are counted there, and a name is looked up for it


class Hub:
    """Stands for the hub: the files as a stream that breaks at random places."""

    def __init__(self, folder: Path, chance: float, seed: int = 0) -> None:
        self.folder, self.chance, self.draw, self.drops = folder, chance, random.Random(seed), 0

    def load_dataset_builder(self, *_: object, columns: list[str] | None = None, **__: object) -> "_Builder":
        paths = [str(path) for path in sorted(self.folder.glob("*.parquet"))]
        return _Builder(self, _BUILDER("parquet", data_files=paths, columns=columns))

    def drop_perhaps(self) -> None:
        if self.draw.random() < self.chance:
            self.drops += 1
            raise ConnectionResetError("the line dropped")


class _Builder:
    def __init__(self, hub: Hub, builder: datasets.DatasetBuilder) -> None:
        self.hub, self.builder, self.config = hub, builder, builder.config

    def as_streaming_dataset(self, *, split: str) -> "_Stream":
        self.hub.drop_perhaps()
        return _Stream(self.hub, self.builder.as_streaming_dataset(split=split))


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
