"""What computes, as the machine tells it: a processor alone, GPUs, and a driver that nobody asks."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from megatron_vpmoe import software


@pytest.fixture(autouse=True)
def not_yet_asked():
    software._machine.cache_clear()
    yield
    software._machine.cache_clear()


def program(folder: Path, text: str) -> None:
    """Put ``nvidia-smi`` there, which prints the text."""
    script = folder / "nvidia-smi"
    script.write_text(f"#!/bin/sh\ncat <<'END'\n{text}\nEND\n")
    script.chmod(0o755)


def test_without_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(software, "_NVIDIA_DRIVER", tmp_path / "absent")
    found = software.hardware()
    assert json.loads(json.dumps(found)) == found
    assert found["gpus"] == [] and found["driver"] is None and found["hosts"] == 1
    assert found["cpu"] and found["cores"] == len(os.sched_getaffinity(0)) and found["memory_gib"] > 0


def test_gpus_and_hosts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    program(tmp_path, "NVIDIA H200, 143771, 570.86.15\nNVIDIA H200, 143771, 570.86.15")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("GROUP_WORLD_SIZE", "3")
    found = software.hardware()
    assert found["gpus"] == ["NVIDIA H200"] * 2 and found["driver"] == "570.86.15"
    assert found["gpu_memory_gib"] == 140 and found["hosts"] == 3


def test_a_driver_that_nobody_asks_is_not_no_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15")
    monkeypatch.setattr(software, "_NVIDIA_DRIVER", tmp_path / "version")
    assert software.hardware()["gpus"] is None


def test_a_processor_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "cpuinfo").write_text("processor : 0\nCPU implementer : 0x41\n")
    monkeypatch.setattr(software, "_CPU_INFO", tmp_path / "cpuinfo")
    assert software.hardware()["cpu"] == os.uname().machine
