"""What a run says and leaves of losses that spike and are trained on."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from megatron_vpmoe.metrics import MetricStream
from megatron_vpmoe.training.failure_policy import judge
from megatron_vpmoe.training.spikes import Spikes
from megatron_vpmoe.training.step import StepResult
from tests.tiny import tiny_config


def test_a_loss_that_keeps_jumping_leaves_so_many_files_and_says_so_once(tmp_path: Path) -> None:
    cfg = tiny_config()
    assert cfg.failure.spike_policy == "warn"
    run: Any = SimpleNamespace(cfg=cfg, directory=tmp_path, spikes=Spikes(cfg.failure))
    batch: Any = SimpleNamespace(sample_ids=[7])
    said: list[str] = []
    for step in range(1, 41):
        if step == 20:  # the run is continued
            kept = json.loads(json.dumps(run.spikes.state()))
            run.spikes = Spikes(cfg.failure)
            run.spikes.restore(kept)
        run.iteration, run.spikes.z = step - 1, 99.0
        result = StepResult({"loss/total": 5.0}, 1.0, updated=True)
        goes_back, found = judge(run, result, [batch], MetricStream([]), said.append)
        assert not goes_back and found == {"spike/z": 99.0, "spike/action": 1.0}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert files == [f"spike_{step:07d}_rank0.json" for step in range(1, 33)]
    assert json.loads((tmp_path / files[-1]).read_text())["sample_ids"] == [7]
    assert len(said) == 40 and all("it is trained on" in line for line in said)
    assert [step for step, line in enumerate(said, 1) if "no file is written" in line] == [32]
    assert files[31] in said[31] and "rank0" not in said[32]
