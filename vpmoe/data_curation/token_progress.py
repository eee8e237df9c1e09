"""Progress of a pass over a source whose rows nobody has counted: a line now and then, with rates and time left."""

from __future__ import annotations

import sys
import time

from vpmoe.data_curation.rows.source import RowSource

_LINE_SECONDS = 10.0


class TokenProgress:
    """Counts rows and tokens, and judges what is left by the token budget or by the bytes of the source.

    Args:
        phase: what is being done.
        source: whose ``bytes_read`` is looked at.
        budget: tokens after which the pass ends.
        begun_with: tokens that an earlier run made.
        quiet: show nothing.
    """

    def __init__(
        self, phase: str, source: RowSource, budget: int | None, *, begun_with: int = 0, quiet: bool = False
    ) -> None:
        self._phase, self._source, self._budget, self._quiet = phase, source, budget, quiet
        self._begun_with = begun_with
        self._rows = self._tokens = 0
        self._started = self._last_line = time.monotonic()

    def show(self, rows: int, tokens: int) -> None:
        """Count ``rows`` and ``tokens`` more as done; prints every ten seconds."""
        self._rows += rows
        self._tokens += tokens
        if not self._quiet and time.monotonic() - self._last_line > _LINE_SECONDS:
            self._print()

    def going_on(self, rows: int) -> None:
        """Say that an earlier run's rows are kept; getting past them in local files may take a while."""
        if not self._quiet:
            print(f"{self._phase}: going on behind {rows:,} rows that are done", file=sys.stderr, flush=True)

    def end(self) -> None:
        """Print the last line."""
        if not self._quiet:
            self._print()

    def _print(self) -> None:
        self._last_line = time.monotonic()
        seconds = max(self._last_line - self._started, 1e-6)
        done = 0.0
        if self._source.total_bytes:
            done = self._source.bytes_read / self._source.total_bytes
        if self._budget is not None:
            done = max(done, (self._begun_with + self._tokens) / self._budget)
        left = f"  {done:.0%}, about {seconds * (1 - done) / done:.0f} s left" if 0 < done <= 1 else ""
        print(
            f"{self._phase}: {self._rows:,} rows, {self._tokens:,} tokens  {self._rows / seconds:,.0f} rows/s  "
            f"{self._tokens / seconds / 1e6:.2f} M tokens/s{left}",
            file=sys.stderr,
            flush=True,
        )
