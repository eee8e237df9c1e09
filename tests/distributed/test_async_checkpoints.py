"""Checkpoints of two ranks that are written while training goes on, and files that ranks hash together."""

from __future__ import annotations

import resource
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_vpmoe import files
from megatron_vpmoe.errors import CheckpointError
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training import checkpoint, checkpoint_files
from megatron_vpmoe.training.checkpoint_hashes import share_of, with_all_ranks
from tests.tiny import tiny_config
from tests.training_runs import checkpoint_tensors
from tests.workers import run_workers

pytestmark = pytest.mark.slow


def _two_ranks(folder: str) -> dict[str, Any]:
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.optim import build_optimizer, build_scheduler

    distributed.initialize(seed=1)
    cfg = tiny_config(num_layers=2, nproc_per_node=2)
    model = build_model(cfg)
    optimizer = build_optimizer([wrap_for_training(model, cfg)], cfg)
    parts = model, optimizer, build_scheduler(optimizer, cfg)
    state, rank, said = {"world_size": 2}, distributed.rank(), []
    root = Path(folder)
    checkpoint.save(root / "at once", {**state, "iteration": 1}, *parts).wait()
    saving = checkpoint.save(root / "later", {**state, "iteration": 1}, *parts, copy=True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1.0)
    later = saving.wait()
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limited_rank in (0, 1):  # as on a full disk
        if rank == limited_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        saving = checkpoint.save(root / "later", {**state, "iteration": 2}, *parts, copy=True)
        try:
            while not saving.advance(0.01):
                pass
        except CheckpointError as error:
            said.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    hashed, hash_file = [], files.sha256_of_file
    lock = threading.Lock()

    def watched(path: Path, tell: files.Tell | None = None) -> str:
        with lock:
            hashed.append(path.name)
        return hash_file(path, tell)

    files.sha256_of_file = watched
    found = with_all_ranks(lambda: str(checkpoint_files.open_checkpoint(later).path))
    files.sha256_of_file = hash_file
    if rank == 0:
        content = bytearray((later / "__1_0.distcp").read_bytes())
        content[len(content) // 2] ^= 1
        (later / "__1_0.distcp").write_bytes(content)
    torch.distributed.barrier()
    try:
        with_all_ranks(lambda: checkpoint_files.open_checkpoint(later))
    except CheckpointError as error:
        said.append(str(error))
    distributed.shutdown()
    return {
        "said": said,
        "hashed": hashed,
        "found": found,
        "left": sorted(path.name for path in later.parent.iterdir()),
    }


def test_two_ranks_write_fail_and_hash_together(tmp_path: Path) -> None:
    first, second = run_workers(2, _two_ranks, str(tmp_path), folder=tmp_path)
    assert first["said"] == second["said"] and len(first["said"]) == 3
    for rank, said in enumerate(first["said"][:2]):
        assert "File too large" in said and f"rank {rank}" in said
    assert "__1_0.distcp does not have the sha256" in first["said"][2]
    assert first["left"] == ["iter_0000001", "latest_checkpointed_iteration.txt"]
    assert first["found"] == second["found"] == str(tmp_path / "later" / "iter_0000001")
    # Each file once, and the two large ones by different ranks.
    listed = files.read_json(tmp_path / "later" / "iter_0000001" / "files.json")
    assert sorted(first["hashed"] + second["hashed"]) == sorted(Path(name).name for name in listed)
    assert ("__0_0.distcp" in first["hashed"]) != ("__1_0.distcp" in first["hashed"])
    at_once = tmp_path / "at once" / "iter_0000001"
    assert files.read_json(at_once / "files.json").keys() == listed.keys()
    for name in ("__0_0.distcp", "common.pt"):
        assert (at_once / name).read_bytes() == (tmp_path / "later" / "iter_0000001" / name).read_bytes()
    assert checkpoint_tensors(at_once).keys()


def test_shares_are_even_and_whole() -> None:
    sizes = {"a": 10, "b": 9, "c": 1, "d": 0, "e": 2}
    listed = {name: {"bytes": size} for name, size in sizes.items()}
    shares = [share_of(listed, rank, 2) for rank in range(2)]
    assert sorted(shares[0] + shares[1]) == sorted(sizes)
    assert [sum(sizes[name] for name in share) for share in shares] == [11, 11]
