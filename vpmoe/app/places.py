"""What the app was told to look at, handed from the command to the pages as one argument of the script."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Places:
    """Where things lie.

    Attributes:
        runs_store: None: as :func:`vpmoe.runs.registry.list_runs` says.
        models: models to offer beside those of runs.
        datasets: built datasets, or folders of them.
        reports: reports, or folders of them.
    """

    runs_store: Path | None = None
    models: tuple[Path, ...] = ()
    datasets: tuple[Path, ...] = ()
    reports: tuple[Path, ...] = ()

    def argument(self) -> str:
        """As one word of a command line."""
        store = None if self.runs_store is None else str(self.runs_store)
        named = {name: [*map(str, getattr(self, name))] for name in ("models", "datasets", "reports")}
        return json.dumps({"runs_store": store, **named})

    @classmethod
    def given(cls) -> Places:
        """What the script of the pages was started with."""
        stored = json.loads(sys.argv[1])
        store = stored.pop("runs_store")
        named = {name: tuple(map(Path, paths)) for name, paths in stored.items()}
        return cls(None if store is None else Path(store), **named)
