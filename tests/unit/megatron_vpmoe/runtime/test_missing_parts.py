"""What `prepare` answers for: a missing Transformer Engine and a missing GPU are two things."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from megatron_vpmoe.runtime import distributed

# Torch itself is lent what a GPU answers about its device and its generator; upstream stays as a GPU machine has it.
_ROUTER_AS_WITH_A_GPU = """
import torch

torch.cuda.current_device = lambda: "cpu"
torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda *_, **__: torch.get_rng_state()
torch.cuda.manual_seed = torch.manual_seed
torch.cuda._lazy_call = lambda _call: None

from megatron_vpmoe.runtime import device

really = device.has_gpu
device.has_gpu = lambda: True
device.prepare()
device.has_gpu = really

from megatron.core.tensor_parallel import random
from megatron.core.transformer.moe import moe_utils
assert moe_utils.torch is torch and random._get_cuda_rng_state.__module__ == random.__name__, "an answer for no GPU"

from megatron.core.transformer.moe.moe_layer import get_default_pg_collection
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.model.transformer_config import transformer_config
from megatron_vpmoe.runtime import distributed
from tests.tiny import tiny_config

with distributed.single_process(seed=1):
    router = VPMoERouter(transformer_config(tiny_config()), get_default_pg_collection()).train()
    hidden = torch.randn(6, 2, 32, requires_grad=True)
    weights, routed = router(hidden)
    (weights * torch.randn_like(weights)).sum().backward()
    assert routed.sum() == 24 and router.weight.grad.any() and hidden.grad.any()
print("routed")
"""


@pytest.mark.slow
def test_router_runs_with_a_gpu_and_no_transformer_engine(repository: Path) -> None:
    environment = {**os.environ, "TORCH_COMPILE_DISABLE": "1"}  # what upstream compiles is not the question here
    ran = subprocess.run(
        [sys.executable, "-c", _ROUTER_AS_WITH_A_GPU],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.stdout.strip().endswith("routed"), ran.stderr[-3000:]


def test_the_smallest_numbers_are_whole_again_behind_the_process_groups() -> None:
    with distributed.single_process(seed=1):
        pass
    assert torch.tensor(1e-40) / 2 > 0
