"""What a configuration names as ``module:attribute``: rewards, objectives and suites of other packages."""

from __future__ import annotations

import importlib
from typing import Any

from megatron_vpmoe.errors import ConfigError


def imported(name: str, what: str, *, source: str, remedy: str) -> Any:
    """What ``name`` names, in a module that Python finds.

    Args:
        name: module:attribute.
        what: it is to be, for the message.
        source: the field that names it.
        remedy: of the message.

    Raises:
        ConfigError: there is no such thing, or the module fails as it is imported.
    """
    module, _, attribute = name.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (Exception, SystemExit) as error:  # of others' code, which runs as it is imported
        raise ConfigError(
            f"the {what} {name} cannot be had: {type(error).__name__}: {error}", source=source, remedy=remedy
        ) from error
