"""Several gloo processes inside an ordinary test."""

from __future__ import annotations

import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp

from megatron_vpmoe.runtime.device import prepare


def run_workers(world_size: int, target: Callable[..., Any], *arguments: Any, folder: Path) -> list[Any]:
    """Call ``target(*arguments)`` in ``world_size`` processes described as torchrun would; returns each one's result.

    Args:
        target: a module-level function; what it returns must be savable by torch.save.
        folder: for the results.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    mp.spawn(_work, (world_size, port, target, arguments, str(folder)), nprocs=world_size, join=True)
    return [torch.load(folder / f"result_{rank}.pt", weights_only=False) for rank in range(world_size)]


def _work(rank: int, world_size: int, port: int, target: Callable[..., Any], arguments: tuple, folder: str) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    torch.set_num_threads(1)
    prepare()
    try:
        torch.save(target(*arguments), Path(folder) / f"result_{rank}.pt")
    except BaseException:
        traceback.print_exc()
        raise
