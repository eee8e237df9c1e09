"""Real training runs of the tiny model, in processes of their own, and how to read what they left."""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import psutil
import torch

from megatron_vpmoe.metrics.expert_loads import FILE_NAME, read_expert_loads
from tests.tiny import ROOT, TINY, flag_text
from tests.workers import Started, run_workers

if TYPE_CHECKING:
    from megatron_vpmoe.sources.rewards import Sample

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT / 'Megatron-vpmoe'}:{ROOT}"}


PLAIN: dict[str, Any] = {
    "num_experts": None,
    "window_size": None,
    "local_position_embedding": "none",
    "global_position_embedding": "rope",
    "num_query_groups": 4,
    "num_layers": 2,
    "tpa": False,
    "softmax_type": "vanilla",
    "value_residual": False,
    "activation": "swiglu",
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "qk_layernorm": False,
    "untie_embeddings_and_output_weights": False,
    "optimizer": "adam",
    "normuon_aux_lr": None,
    "lr": 1e-2,
    "min_lr": 1e-3,
    "kd_span_weight_final": 1.0,
    "sample_interval": None,
}
"""Flags of a stack of two plain layers, such as experts are."""


def command(run_dir: Path, dataset: Path, **changes: object) -> list[str]:
    """One worker of a tiny run."""
    fields = {**TINY, "data_path": dataset, "run_dir": run_dir, "log_interval": 1, "save_interval": 5, **changes}
    flags = [f"--{name.replace('_', '-')}={flag_text(value)}" for name, value in fields.items()]
    return [sys.executable, "-m", "megatron_vpmoe.pretrain", str(ROOT / "configs" / "nano" / "stage1.yaml"), *flags]


def work(arguments: list[str]) -> None:
    """What one worker does with the arguments of ``command``, for workers that a test starts itself."""
    from megatron_vpmoe.pretrain import run

    run(arguments)


def start(run_dir: Path, dataset: Path, **changes: object) -> Started:
    """Begin a run."""
    return Started(_run, command(run_dir, dataset, **changes)[3:], environment={})


def _run(arguments: list[str]) -> NoReturn:
    """What a process of ``command`` does, once it is there."""
    from megatron_vpmoe import pretrain
    from megatron_vpmoe.runtime.endings import leave

    signal.signal(signal.SIGINT, signal.SIG_DFL)
    leave(pretrain.main(arguments))


def launcher(config: str, module: str, *arguments: str) -> int:
    """What a process of ``vpmoe train`` does once all is checked, over the workers ``python -m module arguments``."""
    from megatron_vpmoe.config import load_config
    from megatron_vpmoe.launch.workers import Nodes, run_workers

    return run_workers(load_config(Path(config)), Nodes(1, 0, None), module, [*arguments])


def train(run_dir: Path, dataset: Path, **changes: object) -> subprocess.CompletedProcess[str]:
    """Run to the end."""
    return start(run_dir, dataset, **changes).finish()


def train_in_workers(count: int, run_dir: Path, dataset: Path, **changes: object) -> None:
    """Run to the end in ``count`` processes."""
    arguments = command(run_dir, dataset, nproc_per_node=count, **changes)[3:]
    assert run_workers(count, worker, arguments, folder=run_dir.parent) == [0] * count


def worker(arguments: list[str]) -> int:
    """One process of a run; its exit code."""
    from megatron_vpmoe import pretrain

    return pretrain.main(arguments)


def train_until(step: int, how: signal.Signals, run_dir: Path, dataset: Path, **changes: object) -> int:
    """Start a run and send it ``how`` once ``step`` is in its metrics; returns its exit code."""
    run = start(run_dir, dataset, **changes)
    reach(step, run_dir, run.process.is_alive)
    os.kill(run.process.pid or 0, how)
    return run.finish(timeout=60).returncode


def reach(step: int, run_dir: Path, running: Callable[[], bool]) -> None:
    """Wait until ``step`` is in the metrics of a run."""
    deadline = time.monotonic() + 240
    while not any(record["step"] >= step for record in records(run_dir)):
        assert running(), f"the run ended before step {step}"
        assert time.monotonic() < deadline, f"step {step} was not reached"
        time.sleep(0.02)


def train_signalled(
    place: str, count: int, how: signal.Signals, run_dir: Path, dataset: Path, **changes: object
) -> subprocess.CompletedProcess[str]:
    """Start a run that sends itself ``how`` as it calls ``place`` (module:Class.method) for the ``count``-th time."""
    arguments = command(run_dir, dataset, **changes)[3:]
    return Started(_signalled, place, count, how, arguments, environment={}).finish()


def _signalled(place: str, count: int, how: signal.Signals, arguments: list[str]) -> NoReturn:
    """What the process of ``train_signalled`` does."""
    module, _, name = place.partition(":")
    owner = getattr(importlib.import_module(module), name.split(".")[0])
    method, left = getattr(owner, name.split(".")[1]), count

    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal left
        left -= 1
        if not left:
            os.kill(os.getpid(), how)
        return method(*arguments, **named)

    setattr(owner, name.split(".")[1], counted)
    _run(arguments)


def fails(sample: Sample) -> float:
    """A reward with a fault."""
    raise KeyError("answer")


def even_tokens(sample: Sample) -> float:
    """A reward that differs from answer to answer: the share of even tokens."""
    return sum(token % 2 == 0 for token in sample.ids) / len(sample.ids)


def processes_with_environment(name: str, value: str) -> list[str]:
    """Command lines of the live processes that inherited an environment variable with this value."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get(name) == value and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue  # ended meanwhile, or another user's
    return found


def records(run_dir: Path) -> list[dict]:
    """metrics.jsonl, without a last line that is still being written."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return []
    lines = path.read_text().split("\n")
    return [json.loads(line) for line in lines[:-1] if line]


def measured(run_dir: Path) -> dict[tuple[int, str], float]:
    """(step, tag) -> value of everything that does not tell of this machine's time and memory."""
    apart = ("throughput/", "ms/", "memory/", "elapsed/seconds")
    return {(r["step"], r["tag"]): r["value"] for r in records(run_dir) if not r["tag"].startswith(apart)}


def losses(run_dir: Path) -> dict[int, float]:
    """Step -> training loss, as logged (exact: JSON keeps every digit of a double)."""
    return {record["step"]: record["value"] for record in records(run_dir) if record["tag"] == "loss/total"}


def expert_loads(run_dir: Path) -> dict[int, np.ndarray]:
    """Step -> loads [L, E] as recorded, once each."""
    found = read_expert_loads(run_dir / FILE_NAME)
    assert len({*found.steps.tolist()}) == len(found.steps)
    return dict(zip(found.steps.tolist(), found.load_TLE, strict=True))


def sampled(checkpoint: Path) -> dict[str, np.ndarray]:
    """The answers that a checkpoint within a sampling keeps, as columns."""
    with np.load(checkpoint / "position.npz") as arrays:
        return dict(arrays)


def checkpoint_tensors(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint by key: weights and optimizer state."""
    from torch.distributed.checkpoint import FileSystemReader, load
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    reader = FileSystemReader(str(path))
    metadata = reader.read_metadata().state_dict_metadata
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    load(state, storage_reader=reader, no_dist=True)
    return state
