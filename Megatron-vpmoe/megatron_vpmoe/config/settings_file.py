"""The door through which every file of settings comes, YAML or TOML: what may be read, and how its values are shown."""

from __future__ import annotations

import reprlib
import stat
from pathlib import Path
from typing import Any

_MOST_BYTES = 2**18
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 120


def shown(value: Any) -> str:
    """``repr`` of a value of any size and depth, cut for a message."""
    return _SHORT.repr(value)


def read_settings(path: Path) -> str:
    """The text of a file of settings.

    Raises:
        ValueError: why there is none: it cannot be read, is no file, is too large to be settings, or is not UTF-8.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a file")
        if status.st_size > _MOST_BYTES:
            raise ValueError(f"{status.st_size:,} bytes are not settings, which have {_MOST_BYTES:,} at most")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text ({error.reason} at byte {error.start})") from error
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error
