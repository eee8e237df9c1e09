"""What runs here: interpreter, packages against requirements/lock.txt, cores."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from megatron_vpmoe.software import hardware, package_versions
from vpmoe.quickstart.settings import QuickstartError

_MAIN = ("torch", "megatron-core", "numpy")


def described() -> str:
    """Interpreter, main packages and processor, in one line."""
    python, *packages = (f"{name} {version}" for name, version in package_versions(_MAIN).items())
    here = hardware()
    return f"{python.capitalize()}, {', '.join(packages)}, {here['cores']} cores of {here['cpu']}"


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
