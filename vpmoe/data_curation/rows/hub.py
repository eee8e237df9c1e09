"""Rows of a hub dataset, streamed, that survive a dropped connection: retries with growing waits, and a cursor.

The cursor holds the state of the `datasets` stream (file of the dataset and row within it), so going on costs one file
from its beginning at most, never the whole dataset.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

from megatron_vpmoe.errors import visible
from vpmoe.data_curation.rows.files import Columns, Row
from vpmoe.data_curation.rows.parquet import decoded
from vpmoe.errors import DataError

# Waits between attempts that bring no row; a row that arrives starts the count afresh.
RETRY_SECONDS = (1, 2, 4, 8, 16, 32, 60, 60, 60, 60)
_STATE_ROWS = 1000
_COMMIT = re.compile("[0-9a-f]{40}")


def commit(hub_id: str, revision: str | None) -> str:
    """``revision``, if it pins the dataset ``hub_id``: a branch or a tag moves, and the work could not be repeated.

    Raises:
        DataError: it is no whole commit hash.
    """
    if revision is None or not _COMMIT.fullmatch(revision):
        raise DataError(
            f"{hub_id} is no local path, and to be read from the hub it needs a commit, not {revision or 'nothing'!r}",
            source="--revision",
            remedy="pass --revision <commit>: the 40 hexadecimal digits that the dataset's page shows under its files",
        )
    return revision


class HubRows:
    """``(place, row)`` of a hub dataset in its own order.

    Args:
        hub_id: ``owner/name``.
        revision: commit.
        cursor: where to begin: what :meth:`cursor` gave; None begins at the first row.
        columns: held against the dataset's before the first row; others are not fetched, where the files allow it.
        config, split: of the dataset.
    """

    def __init__(
        self,
        hub_id: str,
        revision: str | None,
        cursor: Mapping[str, Any] | None,
        columns: Columns,
        *,
        config: str | None = None,
        split: str = "train",
    ) -> None:
        self._hub_id, self._revision, self._columns = hub_id, revision, columns
        self._config, self._split = config, split
        self._row = cursor["row"] if cursor else 0
        # The stream's own state and the row it stands before.
        self._state, self._state_row = (cursor["state"], cursor["state_row"]) if cursor else (None, 0)
        self._stream: Any = None

    def cursor(self) -> dict[str, Any]:
        """Where to go on, JSON; to be called between two rows."""
        self._note_state()
        return {"row": self._row, "state": self._state, "state_row": self._state_row}

    def __iter__(self) -> Iterator[tuple[str, Row]]:
        import httpx2  # the hub client's transport, whose errors are not OSErrors
        from datasets.exceptions import DatasetsError

        attempt = 0
        while True:
            before = self._row
            try:
                yield from self._connected()
                return
            except ValueError as error:  # a split or a config that does not exist
                raise self._gave_up(error) from error
            except (OSError, DatasetsError, httpx2.HTTPError) as error:
                attempt = 0 if self._row > before else attempt + 1
                permanent = isinstance(error, (FileNotFoundError, PermissionError))
                if permanent or attempt >= len(RETRY_SECONDS):
                    raise self._gave_up(error) from error
                print(
                    visible(f"{self._hub_id}: dropped at row {self._row:,} ({type(error).__name__}: {error}); ")
                    + f"again in {RETRY_SECONDS[attempt]} s",
                    file=sys.stderr,
                    flush=True,
                )
                time.sleep(RETRY_SECONDS[attempt])

    def _connected(self) -> Iterator[tuple[str, Row]]:
        # Imported here: it takes seconds, and local sources do not need it.
        import datasets

        self._stream = None
        build = partial(datasets.load_dataset_builder, self._hub_id, self._config, revision=self._revision)
        builder = build()
        stream = cast("datasets.IterableDataset", builder.as_streaming_dataset(split=self._split))
        if stream.column_names:
            wanted = self._columns.of(stream.column_names, self._hub_id)
            if self._columns.needed is not None:
                # Selecting alone drops columns that were fetched; parquet's reader is told not to fetch them.
                if hasattr(builder.config, "columns"):
                    stream = build(columns=wanted).as_streaming_dataset(split=self._split)
                stream = cast("datasets.IterableDataset", stream).select_columns(wanted)
        if self._state is not None:
            stream.load_state_dict(self._state)
        skipped = self._row - self._state_row
        for row in stream:
            if skipped:
                skipped -= 1
                continue
            self._stream = stream
            self._row += 1
            yield f"{self._hub_id}:{self._row - 1}", decoded(row)
            if self._row % _STATE_ROWS == 0:
                self._note_state()

    def _note_state(self) -> None:
        if self._stream is not None:
            self._state, self._state_row = self._stream.state_dict(), self._row

    def _gave_up(self, error: Exception) -> DataError:
        return DataError(
            f"the hub dataset cannot be read: {type(error).__name__}: {error}",
            source=f"{self._hub_id} at {self._revision}, row {self._row}",
            remedy="check network, revision, config and split and run the same command again (it goes on where it "
            "stopped), or pass files that were fetched before",
        )
