"""What tests of suites in training have in common: settings, and suites of another package."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.training.suites import Suite, SuiteRequest
from tests.tiny_core_bundle import TASKS
from vpmoe.eval.suites.in_training import core8

CORE8 = f"""tasks = {list(TASKS)}
seed = 1337
shot_seed = 1234
batch_size = 5
[items]
smoke = 3
[bundle]
url = "http://localhost/bundle.zip"
sha256 = "{"0" * 64}"
folder = "no_bundle_here"
"""


CANARIES = """max_new_tokens = 3
batch_size = 4
temperature = 1.0
seed = 1
[items]
smoke = 1
[pinned]
brief = "Hello"
sum = "What is 1 + 2?"
"""


def core8_suite(folder: Path, bundle: Path, **changes: Any) -> dict[str, Any]:
    """An entry of ``eval_suites``; its settings are written into ``folder``."""
    (folder / "core8.toml").write_text(CORE8)
    options = {"config": str(folder / "core8.toml"), "bundle": str(bundle)}
    return {"suite": "core8", "interval": 2, "items": 4, "options": options, **changes}


def canaries_suite(folder: Path, **changes: Any) -> dict[str, Any]:
    """An entry of ``eval_suites``; its settings are written into ``folder``."""
    (folder / "canaries.toml").write_text(CANARIES)
    options = {"config": str(folder / "canaries.toml"), "tasks": ["copying", "harmony", "addition", "pinned"]}
    options["context"] = 320
    return {"suite": "canaries", "interval": 2, "items": 1, "options": options, **changes}


def restless(request: SuiteRequest) -> Suite:
    """A suite that leaves everything behind that a suite could: draws, another mode, moved buffers."""

    def ask(model: VPModel, stop: StopRequest) -> Mapping[str, float]:
        assert not model.training and not torch.is_grad_enabled()
        model.train()
        for buffer in model.buffers():
            buffer.add_(1)
        return {"drawn": float(torch.rand(3).sum()) + random.random() + np.random.rand()}

    return ask


def terminated(request: SuiteRequest) -> Suite:
    """CORE's items; the last rank is asked to stop as it begins."""
    asked = core8(request)

    def ask(model: VPModel, stop: StopRequest) -> Mapping[str, float]:
        if distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return asked(model, stop)

    return ask


def failing(request: SuiteRequest) -> Suite:
    """A suite that gives a text where a number is wanted."""
    return lambda model, stop: {"accuracy": "all of them"}  # type: ignore[dict-item]


def no_suite(request: SuiteRequest) -> None:
    """What returns nothing."""
