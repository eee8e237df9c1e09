"""What computes: the revision of the code, the versions of packages and the hardware; and the block that tells it."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "megatron-core", "numpy", "triton", "transformer-engine", "transformers", "safetensors")
"""Those that compute, as far as they are installed."""
_CPU_INFO = Path("/proc/cpuinfo")
_NVIDIA_DRIVER = Path("/proc/driver/nvidia/version")
_GIB = 2**30


def provenance(
    *,
    config_hash: str | Mapping[str, str] | None = None,
    tokenizer: Mapping[str, Any] | None = None,
    dataset: str | list[str] | Mapping[str, Any] | None = None,
    packages: Iterable[str] = PACKAGES,
) -> dict[str, Any]:
    """Where something comes from: the one block that checkpoints, reports and receipts carry; JSON-ready.

    What nobody knows, or there is none of, is None.

    Args:
        config_hash: of the run that it tells of; of several, by name.
        tokenizer: the vocabulary's identity; of several runs by name.
        dataset: the manifest's sha256; of a blend a list, of several runs by name.
        packages: distributions whose versions are told.

    Returns:
        ``git`` {sha, dirty}, ``config_hash``, ``tokenizer``, ``dataset_manifest_sha256``, ``packages`` (name ->
        version, "python" included) and ``hardware``.
    """
    return {
        "git": git_state(),
        "config_hash": config_hash,
        "tokenizer": tokenizer,
        "dataset_manifest_sha256": dataset,
        "packages": package_versions(packages),
        "hardware": hardware(),
    }


def is_provenance(block: Any) -> bool:
    """Whether something that was read is as ``provenance`` gives it; entries may be lacking."""
    if not isinstance(block, dict):
        return False
    parts = [block.get(name) or {} for name in ("git", "tokenizer", "packages", "hardware")]
    return all(isinstance(part, dict) for part in parts) and isinstance(parts[-1].get("gpus"), list | None)


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


def hardware() -> dict[str, Any]:
    """What this process computes on; JSON-ready. Asked for once a process; no GPU's context is opened.

    Returns:
        ``cpu`` (the model's name), ``cores`` (that this process may use), ``memory_gib`` (of the machine), ``gpus``
        (name of each; None where a driver is loaded and ``nvidia-smi`` does not answer), ``gpu_memory_gib`` (of the
        first), ``driver`` and ``cuda`` (versions of NVIDIA's driver and of the CUDA that it brings), each None without,
        and ``hosts`` (machines of the run, as torchrun counts its agents).
    """
    return {**_machine(), "hosts": int(os.environ.get("GROUP_WORLD_SIZE", "1"))}


@functools.cache
def _machine() -> dict[str, Any]:
    gpus = _gpus()
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB),
        "gpus": None if gpus is None else [name for name, _, _ in gpus],
        "gpu_memory_gib": round(int(gpus[0][1]) / 1024) if gpus and gpus[0][1].isdecimal() else None,
        "driver": gpus[0][2] if gpus else None,
        "cuda": _cuda_of_driver(),
    }


def _cpu_model() -> str:
    """As the kernel names it; the architecture where it gives no name, as on most of ARM's."""
    lines = _CPU_INFO.read_text().splitlines() if _CPU_INFO.is_file() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _gpus() -> list[list[str]] | None:
    """Name, MiB and driver's version of each; None where there may be some that nobody tells of."""
    told = _said("nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader,nounits")
    if told is None:
        return None if _NVIDIA_DRIVER.exists() else []
    return [[cell.strip() for cell in line.rsplit(",", 2)] for line in told.splitlines()]


def _cuda_of_driver() -> str | None:
    """cuDriverGetVersion answers before cuInit: no GPU's context is opened."""
    number = ctypes.c_int()
    try:
        failed = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(number))
    except OSError:
        return None
    return None if failed else f"{number.value // 1000}.{number.value % 1000 // 10}"


def _git(folder: Path, *arguments: str) -> str | None:
    return _said("git", "-C", str(folder), *arguments)


def _said(*command: str) -> str | None:
    """What a program printed; None: it is not there, failed or took more than ten seconds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
