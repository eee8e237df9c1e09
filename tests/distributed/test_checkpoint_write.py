"""A save forks nothing, and a rank that cannot write is no riddle to the others."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import psutil
import pytest
import torch

from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training import torch_dist
from tests.workers import run_workers

pytestmark = pytest.mark.slow


def _save(folder: str) -> list[tuple[str, int]]:
    distributed.initialize(seed=1)
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    rank, results = distributed.rank(), []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limited_rank in (None, 0, 1):
        if rank == limited_rank:  # as on a full disk: a write fails in the middle of a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        path, said = Path(folder) / str(limited_rank), ""
        path.mkdir(exist_ok=True)
        tensor = ShardedTensor.from_rank_offsets("w", torch.ones(1, 9000), (0, rank, 2))
        try:
            torch_dist.write(path, {"w": tensor}, {})
        except CheckpointError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        results.append((said, len(psutil.Process().children())))
    return results


def test_what_fails_on_one_rank_is_told_by_all_and_nothing_is_forked(tmp_path: Path) -> None:
    for sound, first, second in run_workers(2, _save, str(tmp_path), folder=tmp_path):
        assert sound == ("", 0)
        for limited_rank, (said, children) in enumerate((first, second)):
            assert "File too large" in said and f"rank {limited_rank}" in said and str(tmp_path) in said
            assert children == 0
    assert torch_dist.Reader(tmp_path / "None").tensor("w").sum() == 18_000
