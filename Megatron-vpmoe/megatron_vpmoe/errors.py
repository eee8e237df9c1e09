"""The errors a user can cause: each names the value, where it came from and the remedy."""

from __future__ import annotations


class VpmoeError(Exception):
    """Base of every error that is the user's to mend; entry points print it without a traceback and exit with 2.

    Args:
        what: what is wrong, naming the offending value.
        source: the file, key, row or rank it came from.
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


class ConfigError(VpmoeError):
    """A configuration that cannot run: unknown key, wrong type, fields that contradict each other."""


class DataError(VpmoeError):
    """A dataset that is missing, incomplete or disagrees with itself or with the model."""


class TokenizerError(VpmoeError):
    """A vocabulary that does not match the model."""


class CheckpointError(VpmoeError):
    """A checkpoint that is damaged, of another geometry or of another provenance."""


class DeviceError(VpmoeError):
    """A run that this machine cannot hold or a feature that it cannot execute."""


class NonFiniteError(VpmoeError):
    """A loss or gradient that is not finite, under the policy ``stop`` or past the permitted skips."""
