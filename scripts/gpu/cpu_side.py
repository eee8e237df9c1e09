"""The CPU's numbers, by a process that sees no GPU: there everything runs as it does on a machine without one.

    python -m scripts.gpu.cpu_side FOLDER [--dry-run] SECTION ...

Each section's numbers become ``FOLDER/SECTION.pt`` as soon as they are there; where it fails, ``SECTION.error`` says
why.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

from scripts.gpu.frame import Numbers

ROOT = Path(__file__).resolve().parents[2]


class CpuSide:
    """The process, which starts when it is first asked and then computes for all ``sections``."""

    def __init__(self, folder: Path, sections: list[str], *, dry: bool) -> None:
        self._folder = folder
        small = ["--dry-run"] if dry else []
        self._command = [sys.executable, "-m", "scripts.gpu.cpu_side", str(folder), *small, *sections]
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, section: str) -> Numbers:
        """Its numbers; waits for them.

        Raises:
            RuntimeError: the process could not compute them.
        """
        if self._process is None:
            self._process = subprocess.Popen(self._command, cwd=ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})
        numbers, error = (self._folder / f"{section}.{kind}" for kind in ("pt", "error"))
        while True:
            ended = self._process.poll()
            if numbers.exists():
                return torch.load(numbers, weights_only=True)
            if error.exists():
                raise RuntimeError(f"the CPU has no numbers for it: {error.read_text()}")
            if ended is not None:
                raise RuntimeError(f"the process that computes the CPU's numbers ended with {ended} before it had them")
            time.sleep(0.05)

    def close(self) -> None:
        """End it, wherever it is: timings want a quiet machine."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()


def main() -> None:
    """Compute what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("sections", nargs="+")
    arguments = parser.parse_args()
    from megatron_vpmoe.runtime import distributed
    from scripts.gpu.sections import SECTIONS

    for section in SECTIONS:
        if section.name not in arguments.sections or section.numbers is None:
            continue
        kind, partial = "pt", arguments.folder / f"{section.name}.partial"
        try:
            with distributed.single_process(seed=1):  # weights that are drawn are the same whatever came before
                torch.save(section.numbers(arguments.dry_run), partial)
        except Exception:
            kind = "error"
            partial.write_text(traceback.format_exc())
        partial.replace(arguments.folder / f"{section.name}.{kind}")


if __name__ == "__main__":
    main()
