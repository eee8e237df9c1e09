"""A worker that hangs in Python, in C, in a collective of its own, or is stopped: all end, and it is named first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.training_runs import launcher
from tests.workers import Started

pytestmark = pytest.mark.slow

HANGING = """
import ctypes, os, signal, sys
import torch, torch.distributed as dist
from megatron_vpmoe.runtime import pulse

def hang_here(kind):
    if kind == "python":
        while True:
            pass
    if kind == "c":
        ctypes.PyDLL(None).sleep(1000)  # keeps Python's lock
    if kind == "stopped":
        os.kill(os.getpid(), signal.SIGSTOP)
    dist.broadcast(torch.ones(1), src=0)

pulse.begin(int(os.environ["RANK"]), os.environ["VPMOE_ENDINGS"])
dist.init_process_group("gloo")
dist.barrier()
with pulse.watched(3):
    if os.environ["RANK"] == "1":
        hang_here(sys.argv[1])
    dist.all_reduce(torch.ones(1))
"""


@pytest.mark.parametrize(
    ("kind", "first"),
    [
        ("python", "worker 1: no sign of life for"),
        ("c", "worker 1: no sign of life for"),
        ("stopped", "worker 1: no sign of life for"),
        ("collective", "no sign of life for"),
    ],
)
def test_all_end_and_the_one_that_hangs_is_named(repository: Path, tmp_path: Path, kind: str, first: str) -> None:
    (tmp_path / "hanging_worker.py").write_text(HANGING)
    (tmp_path / "run.yaml").write_text(
        f"extends: {repository / 'configs' / 'nano' / 'stage1.yaml'}\n"
        f"data: {{data_path: {tmp_path}}}\nparallel: {{nproc_per_node: 2}}\n"
    )
    environment = {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}
    words = (str(tmp_path / "run.yaml"), "hanging_worker", kind)
    done = Started(launcher, *words, environment=environment).finish(timeout=240)
    code, said = done.returncode, done.stderr
    told = [line for line in said.splitlines() if "kill -CONT" not in line and "arn" not in line]
    assert code == 1, said
    assert told[0].startswith(first), said
    assert "stack of worker 0" in said and "stack of worker 1" in said, said
    assert "all_reduce" in said and ("hang_here" in said), said
    assert (kind == "collective") == ("each for another collective" in told[0])
    assert (kind == "stopped") == ("it is stopped (SIGSTOP)" in told[0])
