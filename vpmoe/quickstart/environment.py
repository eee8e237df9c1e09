"""What runs here: interpreter, packages against requirements/lock.txt, cores."""

from __future__ import annotations

import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_vpmoe.software import package_versions
from vpmoe.quickstart.settings import QuickstartError


def describe() -> dict[str, Any]:
    """Versions and cores, for a report."""
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "packages": package_versions(("torch", "megatron-core", "numpy")),
    }


def differing_packages(lock: Path) -> list[str]:
    """A line for each package of the lock file (``name==version`` a line) that is missing or of another version.

    Raises:
        QuickstartError: the file is missing.
    """
    if not lock.is_file():
        raise QuickstartError(
            "there is no lock file", source=str(lock), remedy="run the quickstart from a whole checkout"
        )
    differing = []
    lines = (line.split("#")[0].strip().partition("==") for line in lock.read_text().splitlines())
    for name, pinned in ((name, pinned) for name, separator, pinned in lines if separator):
        try:
            # A build label behind + (2.13.0+cpu) is another build of the same version.
            installed = version(name).split("+")[0]
        except PackageNotFoundError:
            installed = "not installed"
        if installed != pinned.split("+")[0]:
            differing.append(f"{name} {installed}, pinned {pinned}")
    return differing
