"""What can stop the quickstart beyond the errors of its own commands, which print their own messages."""

from __future__ import annotations

from vpmoe.errors import VpmoeError


class QuickstartError(VpmoeError):
    """A setting that cannot be, a folder that is not ours to replace, a command that did not do its part."""


class CommandFailed(QuickstartError):
    """A command ended with an error that it has explained itself.

    Args:
        command: as a user would type it.
        exit_code: the command's own, which becomes the quickstart's.
    """

    def __init__(self, command: str, exit_code: int) -> None:
        super().__init__(
            f"the command ended with exit code {exit_code}: {command}",
            remedy="its message is above; after mending it, run the quickstart again: it goes on from here",
        )
        self.exit_code = exit_code


class Interrupted(QuickstartError):
    """A signal ended the quickstart; what was done is kept.

    Args:
        signal_name: such as SIGINT.
        number: of the signal; the exit code is 128 more, as shells have it.
    """

    def __init__(self, signal_name: str, number: int) -> None:
        super().__init__(f"stopped by {signal_name}; run the same command again to go on from here")
        self.exit_code = 128 + number
