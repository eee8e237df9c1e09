"""Errors that a user can cause in the sidecar; their base, and those that training shares, are megatron_vpmoe's."""

from __future__ import annotations

from megatron_vpmoe.errors import BusyError, DataError, NotOursError, TokenizerError, VpmoeError, of_the_system

__all__ = [
    "BusyError",
    "DataError",
    "EndpointError",
    "HarmonyError",
    "NotOursError",
    "RowError",
    "TokenizerError",
    "UpcycleError",
    "VpmoeError",
    "WeightsError",
    "of_the_system",
]


class HarmonyError(VpmoeError):
    """A conversation that has no valid Harmony form, or token ids that are not valid Harmony.

    Args:
        reason: a short stable name of the fault (``no_channel``), the key under which faults are counted.
    """

    def __init__(
        self, what: str, *, source: str | None = None, remedy: str | None = None, reason: str = "invalid"
    ) -> None:
        self.reason = reason
        super().__init__(what, source=source, remedy=remedy)


class RowError(VpmoeError):
    """An input row that cannot become a conversation; builders collect these as rejects.

    Args:
        reason: a short stable name of the fault (``empty_field``), the key under which rejects are counted.
        what: the fault in words, naming field and value.
    """

    def __init__(
        self, reason: str, what: str | None = None, *, source: str | None = None, remedy: str | None = None
    ) -> None:
        self.reason = reason
        super().__init__(what or reason, source=source, remedy=remedy)


class WeightsError(VpmoeError):
    """Weights that are missing, damaged, or of another geometry than was declared."""


class UpcycleError(VpmoeError):
    """A job of the ladder that cannot run: an object that is missing, altered or stale, or a result out of bounds."""


class EndpointError(VpmoeError):
    """A served model that cannot be asked, or whose answer cannot be used.

    Args:
        reason: a short stable name of the fault: ``unauthorized``, ``not_found``, ``refused``, ``rate_limited``,
            ``timeout``, ``unreachable``, ``unusable``.
    """

    def __init__(self, what: str, *, source: str | None = None, remedy: str | None = None, reason: str) -> None:
        self.reason = reason
        super().__init__(what, source=source, remedy=remedy)
