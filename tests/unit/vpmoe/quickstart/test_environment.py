"""Installed packages against the lock file."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_vpmoe.software import package_versions
from vpmoe.quickstart.environment import described, differing_packages
from vpmoe.quickstart.settings import QuickstartError


def test_packages_against_the_lock(tmp_path: Path) -> None:
    numpy = package_versions(["numpy"])["numpy"]
    assert f"numpy {numpy}" in described()
    lock = tmp_path / "lock.txt"
    lock.write_text(f"# pins\nnumpy=={numpy}\n--extra-index-url x\n")
    assert differing_packages(lock) == []
    lock.write_text("numpy==0.1\n")
    assert differing_packages(lock) == [f"numpy {numpy}, pinned 0.1"]
    lock.write_text("no-such-package-as-this==1\n")
    assert differing_packages(lock) == ["no-such-package-as-this not installed, pinned 1"]
    with pytest.raises(QuickstartError, match="no lock file"):
        differing_packages(tmp_path / "absent")
