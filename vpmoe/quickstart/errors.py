"""What can stop the quickstart beyond the errors of its own commands, which print their own messages."""

from __future__ import annotations

from vpmoe.errors import VpmoeError


class QuickstartError(VpmoeError):
    """A setting that cannot be, a folder that is not ours to replace, a command that did not do its part."""
