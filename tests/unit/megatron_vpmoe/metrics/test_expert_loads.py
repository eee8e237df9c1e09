"""expert_loads.bin: what was recorded is read back, while it grows, after a kill and after a resume."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.metrics.expert_loads import ExpertLoadFile, read_expert_loads

LAYERS, EXPERTS = [2, 3, 5], 4


def load_of(step: int) -> torch.Tensor:
    return torch.arange(12, dtype=torch.float64).view(3, 4) * step


def write(path: Path, steps: range, **arguments) -> None:
    file = ExpertLoadFile(path, LAYERS, EXPERTS, **arguments)
    for step in steps:
        file.write(step, load_of(step))
    file.close()


def test_loads_are_multiples_of_the_mean_and_dead_is_zero(tmp_path: Path) -> None:
    path = tmp_path / "run" / "loads.bin"
    file = ExpertLoadFile(path, LAYERS, EXPERTS)
    file.write(7, torch.tensor([[4, 0, 2, 2], [0, 0, 0, 0], [10**9, 1, 10**9, 0]]))
    found = read_expert_loads(path)  # while it is open
    file.close()
    assert found.layers == LAYERS and found.steps.tolist() == [7]
    assert found.load_TLE[0, :2].tolist() == [[2, 0, 1, 1], [0, 0, 0, 0]]
    rare = found.load_TLE[0, 2]
    assert (rare > 0).tolist() == [True, True, True, False] and rare[0] == 2


def test_a_record_is_small(tmp_path: Path) -> None:
    """At 80 layers of 256 experts 41 kB."""
    file = ExpertLoadFile(tmp_path / "l", range(1, 81), 256)
    before = (tmp_path / "l").stat().st_size
    file.write(1, torch.ones(80, 256))
    file.close()
    assert (tmp_path / "l").stat().st_size - before == 8 + 2 * 80 * 256


def test_a_resumed_run_has_each_step_once(tmp_path: Path) -> None:
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    write(straight, range(1, 11))
    for last, left in ((8, b"\x09\x00\x00"), (8, bytes(100)), (5, bytes(100))):  # by a killed process; by a lost disk
        write(resumed, range(1, last + 1))
        with resumed.open("ab") as stream:
            stream.write(left)
        assert read_expert_loads(resumed).steps.tolist() == [*range(1, last + 1)]
        write(resumed, range(6, 11), resume_step=5)
        assert resumed.read_bytes() == straight.read_bytes()


def test_of_many_records_every_nth_and_the_last_are_read(tmp_path: Path) -> None:
    write(tmp_path / "l", range(1, 102))
    for most in (2, 3, 10, 100, 101, 500):
        found = read_expert_loads(tmp_path / "l", most=most)
        assert len(found.steps) <= most and found.steps[0] == 1 and found.steps[-1] == 101
        assert (np.diff(found.steps) > 0).all() and len(found.load_TLE) == len(found.steps)


def test_another_models_file_and_what_is_none_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "l", range(1, 3))
    with pytest.raises(DataError, match="4 experts in the layers"):
        ExpertLoadFile(tmp_path / "l", LAYERS, 8)
    assert read_expert_loads(tmp_path / "l").steps.tolist() == [1, 2]
    for content in (
        b"",
        b"\n",
        b"[]\n",
        b'{"layers": [], "experts": 4}\n',
        b'{"layers": [1], "experts": 4}',
        b"\xff" * 99,
    ):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(DataError, match="no file of experts' loads"):
            read_expert_loads(tmp_path / "x")
    with pytest.raises(DataError, match="no loads of experts"):
        read_expert_loads(tmp_path / "none")
