"""Errors that a user can cause in the sidecar: each names the value, where it came from and the remedy.

The shape is the same as in the trainer's own errors, written a second time on purpose: the data side of the sidecar
does not import the trainer.
"""

from __future__ import annotations


class VpmoeError(Exception):
    """Base of every error that is the user's to mend; entry points print it without a traceback and exit with 2.

    Args:
        what: what is wrong, naming the offending value.
        source: the file, key, row or address it came from.
        remedy: what to do about it.
    """

    exit_code = 2

    def __init__(self, what: str, *, source: str | None = None, remedy: str | None = None) -> None:
        self.what, self.source, self.remedy = what, source, remedy
        lines = [what]
        if source:
            lines.append(f"  where:  {source}")
        if remedy:
            lines.append(f"  remedy: {remedy}")
        super().__init__("\n".join(lines))

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes raise these: by default, unpickling would pass the rendered text as `what`.
        return _rebuild, (type(self), str(self), dict(self.__dict__))


def _rebuild(kind: type[VpmoeError], text: str, fields: dict[str, object]) -> VpmoeError:
    error = kind.__new__(kind, text)
    error.__dict__.update(fields)
    return error


class TokenizerError(VpmoeError):
    """A rank file or a vocabulary map that is missing, altered, or does not hold the asked id."""


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


class DataError(VpmoeError):
    """A dataset that is missing, incomplete, stale, or disagrees with its manifest."""


class WeightsError(VpmoeError):
    """Weights that are missing, damaged, or of another geometry than was declared."""


class UpcycleError(VpmoeError):
    """A job of the ladder that cannot run: an object that is missing, altered or stale, or a result out of bounds."""
