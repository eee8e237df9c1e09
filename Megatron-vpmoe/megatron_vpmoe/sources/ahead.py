"""A step made in advance: while one is trained on, a thread prepares the next."""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor

from megatron_vpmoe.sources.interface import Position, Source, Step


class Ahead:
    """Another source's steps, each prepared while the one before is at work.

    One thread does all the reading, so the source and its memory maps are never used by two at once. Only for sources
    that call no collectives.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="batches")
        self._next: Future[Step] | None = None
        self.annotations, self.depends_on_weights = source.annotations, False

    def next_step(self) -> Step:
        """See ``Source``; a fault met in advance is raised by the step that it belongs to."""
        pending, self._next = self._next or self._worker.submit(self._source.next_step), None
        step = pending.result()
        self._next = self._worker.submit(self._source.next_step)
        return step

    def resume(self, position: Position, *, source: str, allow_change: bool = False) -> list[str]:
        """See ``Source``."""
        self._next = None
        resume = self._source.resume
        return self._worker.submit(resume, position, source=source, allow_change=allow_change).result()

    def forget(self) -> None:
        """See ``Source``: nothing depends on weights."""

    def close(self) -> None:
        """See ``Source``."""
        self._next = None
        self._source.close()
        self._worker.shutdown(wait=True, cancel_futures=True)


def ahead(source: Source) -> Source:
    """``source`` with each step made in advance, where that is the same as making it in time."""
    return source if source.depends_on_weights else Ahead(source)
