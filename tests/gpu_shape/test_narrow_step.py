"""The full-scale step with experts in fp8_rowwise, as a Hopper would get it: the host waits nowhere more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_vpmoe.planning.counts import Counts
from tests.counted import ROOT


@pytest.mark.slow
def test_the_host_runs_ahead_of_narrow_experts(tmp_path: Path) -> None:
    """With a launch for each of torchao's kernels; a layer has 23 more of them forward."""
    place, out = {"world": 8, "rank": 0, "steps": 1}, tmp_path / "counts.json"
    words = ["--num-layers", "4", "--global-batch-size", "64", "--experts-precision", "fp8_rowwise"]
    script = ["-m", "tests.gpu_shape.narrow_kernels", str(ROOT / "configs" / "vpmoe_stage1.yaml")]
    command = [sys.executable, *script, json.dumps(place), str(out), *words]
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1", "PYTHONPATH": f"{ROOT / 'Megatron-vpmoe'}:{ROOT}"}
    ran = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr[-4000:]
    counts = Counts.from_json(out.read_text())
    waits = [(of_pass, site) for of_pass, site in counts.syncs if of_pass in ("forward", "again", "backward")]
    assert [site for _, site in waits if not site.startswith("model/attention/grape.py")] == []  # its slopes, once
    assert counts.layers["forward", "local moe"] <= 110
    assert counts.total("backward", "experts").launches > counts.total("forward", "experts").launches > 0
