"""The folder of a dataset in the making: one builder at a time, begun or gone on with, finished by its manifest."""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import json_bytes, write_atomically
from vpmoe.data_curation.datasets.plan import SPLITS
from vpmoe.data_curation.manifest import FILE_NAME, read_manifest, write_manifest
from vpmoe.errors import DataError
from vpmoe.tokenizer.from_dataset import TOKENIZER_FOLDER

COMPACT_MAP_NAME = "compact_vocab.npy"
PIECES_NAME = "token_pieces.txt"
REJECTS_NAME = "rejects.jsonl"
_STATE_NAME = "build.json"


class DatasetFolder:
    """What stands in an output folder, and what may be done to it.

    Args:
        path: the folder.
        kind: of the dataset that is built.
        state: what decides its bytes (hashes of options and input), held against a finished or unfinished build.
    """

    def __init__(self, path: Path, kind: str, state: dict[str, str]) -> None:
        self.path, self._kind, self._state = path, kind, state

    @property
    def scratch(self) -> Path:
        """Where the files of the shard in work lie."""
        return self.path / ".build" / "parts"

    @contextmanager
    def exclusive(self) -> Iterator[None]:
        """Hold the folder against a second builder; the lock goes with the process."""
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / ".lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise DataError(
                    "another build is running in this folder", source=str(self.path), remedy="wait for it, or stop it"
                ) from error
            yield

    def finished(self) -> dict[str, Any] | None:
        """The manifest of a finished dataset of this kind and state; raises :class:`DataError` for another one's."""
        if not (self.path / FILE_NAME).exists():
            return None
        manifest = read_manifest(self.path)
        wanted = {"kind": self._kind, **self._state}
        differing = [key for key, value in wanted.items() if manifest.get(key) != value]
        if differing:
            raise DataError(
                f"the folder holds a finished dataset of another {' and '.join(differing)}",
                source=str(self.path / FILE_NAME),
                remedy="pass --overwrite to replace it, or another --output-dir",
            )
        return manifest

    def begin_or_resume(self) -> None:
        """Make the folder ready, keeping the finished shards of an unfinished build of the same state."""
        path = self.path / ".build" / _STATE_NAME
        if not path.exists():
            self.clear()
            write_atomically(path, json_bytes(self._state))
        elif json.loads(path.read_bytes()) != self._state:
            raise DataError(
                "the folder holds an unfinished build of other options or another input",
                source=str(path),
                remedy="pass --overwrite to start afresh, or go on with the options it was begun with",
            )
        shutil.rmtree(self.scratch, ignore_errors=True)

    def clear(self) -> None:
        """Throw a dataset away, the manifest first: at no moment may it describe files that are half gone."""
        for name in (FILE_NAME, f".build/{_STATE_NAME}", COMPACT_MAP_NAME, PIECES_NAME, REJECTS_NAME):
            (self.path / name).unlink(missing_ok=True)
        for folder in (*SPLITS, TOKENIZER_FOLDER, ".build"):
            shutil.rmtree(self.path / folder, ignore_errors=True)

    def write_rejects(self, rejects: list[dict[str, Any]]) -> Path:
        """List the rejected rows; returns the list's path."""
        path = self.path / REJECTS_NAME
        write_atomically(path, "".join(json.dumps(reject) + "\n" for reject in rejects).encode())
        return path

    def finish(self, manifest: dict[str, Any]) -> None:
        """Write the manifest; the folder is a dataset from here on."""
        write_manifest(self.path, manifest)
        shutil.rmtree(self.path / ".build")
