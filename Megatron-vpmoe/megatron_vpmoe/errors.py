"""The errors a user can cause, of training and of the sidecar: each names the value, where it came from, the remedy."""

from __future__ import annotations

import re

# Control characters drive a terminal, direction controls make text read otherwise than it is, and what has no width
# (tags, fillers, joiners, variation selectors) hides text in text.
_HIDDEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e"
    "\u2060-\u206f\u2800\u3164\ud800-\udfff\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufffb\U00013430-\U0001343f"
    "\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def visible(text: str) -> str:
    """Control, direction and invisible characters (but line feed and tab) as code points, such as ``\\x1b``."""
    return _HIDDEN.sub(lambda found: ascii(found[0])[1:-1], text)


def is_utf8(name: str) -> bool:
    """Whether a name of the system's, which may be any bytes, is one that libraries take."""
    return name == name.encode(errors="replace").decode()


class VpmoeError(Exception):
    """Base of every error that is the user's to mend; entry points print it without a traceback and exit with 2.

    Args:
        what: what is wrong, naming the offending value.
        source: the file, key, row, rank or address it came from.
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
        super().__init__(visible("\n".join(lines)))

    def __reduce__(self) -> tuple[object, ...]:
        # Worker processes raise these: by default, unpickling would pass the rendered text as `what`.
        return _rebuild, (type(self), str(self), dict(self.__dict__))


def _rebuild(kind: type[VpmoeError], text: str, fields: dict[str, object]) -> VpmoeError:
    error = kind.__new__(kind, text)
    error.__dict__.update(fields)
    return error


class ConfigError(VpmoeError):
    """A configuration that cannot run: unknown key, wrong type, fields that contradict each other."""


class DataError(VpmoeError):
    """A dataset that is missing, incomplete, stale, or disagrees with itself, its manifest or the model."""


class TokenizerError(VpmoeError):
    """A vocabulary or rank file that is missing, altered, does not hold the asked id, or does not match the model."""


class CheckpointError(VpmoeError):
    """A checkpoint that is damaged, of another geometry or of another provenance."""


class DeviceError(VpmoeError):
    """A run that this machine cannot hold or a feature that it cannot execute."""


class NonFiniteError(VpmoeError):
    """A number that is not finite where it has to be: a weight, a logit, a figure of a receipt, a loss or gradient."""


class SpikeError(VpmoeError):
    """A loss so far above those before it that the run's policy ends it."""


class BusyError(VpmoeError):
    """Another process works where this one was to work."""


class NotOursError(VpmoeError):
    """What was to be removed or replaced is not known to be made by the command, or is finished work."""


def of_the_system(error: OSError) -> VpmoeError:
    """What the system says of a path that cannot be read or written, as one message."""
    what = f"a file or folder cannot be used: {error.strerror or error}"
    source = " -> ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    remedy = "mend the path or make room, then give the same command again; what was finished before is as it was"
    shown = VpmoeError(what, source=source or None, remedy=remedy)
    shown.__cause__ = error
    return shown
