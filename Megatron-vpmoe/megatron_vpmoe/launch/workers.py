"""Worker processes: started by torchrun's own engine, watched, and their end turned into one exit code.

On several nodes the environment says where they meet: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import logging
import os
import re
import socket
import sys
import tempfile
import uuid
from dataclasses import dataclass
from pathlib import Path

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.config.settings_file import shown
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.launch.watch import Watch
from megatron_vpmoe.runtime import endings

_FAILURE_GRACE_SECONDS = 5  # what the other workers get once one has failed


@dataclass(frozen=True)
class Nodes:
    """Where this node stands among the machines of a run."""

    count: int
    rank: int
    master: str | None

    @staticmethod
    def from_environment() -> Nodes:
        """Read NNODES, NODE_RANK, MASTER_ADDR and MASTER_PORT.

        Raises:
            ConfigError: a number is not one, or several nodes have no meeting point.
        """
        count, rank = _environment_number("NNODES", 1, 10**5), _environment_number("NODE_RANK", 0, 10**5)
        if not 0 <= rank < max(count, 1) or count < 1:
            raise ConfigError(
                f"NODE_RANK={rank} with NNODES={count}",
                source="environment",
                remedy="node ranks run from 0 to NNODES-1",
            )
        if count == 1:
            return Nodes(1, 0, None)
        address, port = os.environ.get("MASTER_ADDR"), _environment_number("MASTER_PORT", 0, 2**16 - 1)
        if not port or not address or not re.fullmatch(r"[\w.:-]+", address, re.ASCII):
            raise ConfigError(
                f"NNODES={count} without a MASTER_ADDR and MASTER_PORT: {shown(address)}, {port or None}",
                source="environment",
                remedy="export the address of node 0 and a free port there, the same on every node",
            )
        return Nodes(count, rank, f"{address}:{port}")

    def check_address(self) -> None:
        """Look the first node up: torch would wait for it deaf to signals, for as long as a collective may take.

        Raises:
            ConfigError: nobody here knows it.
        """
        host, _, port = (self.master or "").rpartition(":")
        try:
            socket.getaddrinfo(host.strip("[]"), port)
        except OSError as error:
            raise ConfigError(
                f"MASTER_ADDR={host} is not known here: {error.strerror}",
                source="environment",
                remedy="export the address of node 0 as this machine knows it",
            ) from error


def _environment_number(name: str, default: int, largest: int) -> int:
    text = os.environ.get(name, "")
    if text and not (re.fullmatch("[0-9]{1,9}", text) and int(text) <= largest):
        what = f"{name}={shown(text)} is not a number from 0 to {largest}"
        raise ConfigError(what, source="environment", remedy=f"unset or correct {name}")
    return int(text) if text else default


def run_workers(cfg: RunConfig, nodes: Nodes, module: str, arguments: list[str], *, debug: bool = False) -> int:
    """Start ``python -m module arguments`` once per process of this node and wait for all of them.

    Returns 0 if all ended well. Otherwise this process ends too, with the exit code of the first cause: 2 for a user's
    error, 128 + n where signal n ended a worker.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not debug:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    alone = nodes.master is None
    if not alone:
        nodes.check_address()
    launch_config = LaunchConfig(
        min_nodes=nodes.count,
        max_nodes=nodes.count,
        nproc_per_node=cfg.parallel.nproc_per_node,
        run_id=uuid.uuid4().hex if alone else cfg.training.run_name,
        rdzv_backend="c10d" if alone else "static",
        rdzv_endpoint=nodes.master or "localhost:0",
        rdzv_configs={} if alone else {"rank": nodes.rank},
        local_addr="127.0.0.1" if alone else None,
        max_restarts=0,
        shutdown_timeout=_FAILURE_GRACE_SECONDS,
        signals_to_handle="SIGQUIT",  # the others are relayed, not turned into an early end
    )
    code = 0
    with tempfile.TemporaryDirectory(prefix="vpmoe-") as folder:
        watch = Watch(module, cfg.parallel.nproc_per_node, Path(folder))
        watch.start()
        os.environ |= {endings.FOLDER: folder, endings.LAUNCHER: str(os.getpid())}
        try:
            elastic_launch(launch_config, sys.executable)("-u", "-m", module, *arguments)
        except ChildFailedError as error:
            codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
            code = watch.verdict(endings.told(Path(folder)), codes)
        finally:
            watch.end()
            del os.environ[endings.FOLDER], os.environ[endings.LAUNCHER]
    if code:
        endings.leave(code)
    return 0


def share_cores(processes: int) -> None:
    """Set OMP_NUM_THREADS for ``processes`` workers on this machine's cores, unless the user has decided."""
    from megatron_vpmoe.runtime import device

    if "OMP_NUM_THREADS" not in os.environ and not device.has_gpu():
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
