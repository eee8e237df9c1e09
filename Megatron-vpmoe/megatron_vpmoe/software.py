"""What computes: the revision of the code and the versions of packages."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def git_state(folder: Path | None = None) -> dict[str, str | bool | None]:
    """{"sha": of HEAD, "dirty": tracked files differ from it}; None for both without git, repository or commit.

    Args:
        folder: in the repository; that of this code by default.
    """
    where = folder or Path(__file__).parent
    sha = _git(where, "rev-parse", "--verify", "HEAD")
    if sha is None:
        return {"sha": None, "dirty": None}
    changes = _git(where, "status", "--porcelain", "--untracked-files=no")
    return {"sha": sha, "dirty": None if changes is None else bool(changes)}


def package_versions(names: Iterable[str]) -> dict[str, str]:
    """Versions of "python" and of the named packages that are installed; without the label of a build (2.13.0+cpu)."""
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = version(name).split("+")[0]
        except PackageNotFoundError:
            continue
    return versions


def _git(folder: Path, *arguments: str) -> str | None:
    command = ["git", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (FileNotFoundError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
