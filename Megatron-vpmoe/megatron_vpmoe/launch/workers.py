"""Worker processes: started by torchrun's own engine, told of signals, and their end turned into one exit code.

On several nodes the environment says where they meet: NNODES, NODE_RANK, MASTER_ADDR, MASTER_PORT.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import uuid
from dataclasses import dataclass
from types import FrameType

from megatron_vpmoe.config import RunConfig
from megatron_vpmoe.config.settings_file import shown
from megatron_vpmoe.errors import ConfigError, VpmoeError

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
        if not address or not port:
            raise ConfigError(
                f"NNODES={count} without MASTER_ADDR and MASTER_PORT",
                source="environment",
                remedy="export the address of node 0 and a free port there, the same on every node",
            )
        return Nodes(count, rank, f"{address}:{port}")


def _environment_number(name: str, default: int, largest: int) -> int:
    text = os.environ.get(name, "")
    if text and not (re.fullmatch("[0-9]{1,9}", text) and int(text) <= largest):
        what = f"{name}={shown(text)} is not a number from 0 to {largest}"
        raise ConfigError(what, source="environment", remedy=f"unset or correct {name}")
    return int(text) if text else default


class SignalRelay:
    """Hands SIGTERM, SIGINT and SIGHUP on to the workers, which finish their step, save and exit by themselves.

    The first signal is handed on once; after it only SIGINT is, by which workers abort at once. SIGHUP reaches them as
    SIGTERM. With no worker started yet the launcher just exits.
    """

    def __init__(self, module: str) -> None:
        self._module = module
        self.received: signal.Signals | None = None

    def install(self) -> None:
        """Take over the three signals of this process (main thread only)."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        again, received = self.received is not None, signal.Signals(signum)
        workers = self._workers()
        self.received = received
        if not workers:
            raise SystemExit(128 + signum)
        if again and received != signal.SIGINT:
            return
        action = "stopping without a checkpoint" if again else "finishing the step, saving, then exiting"
        print(f"{received.name}: {action}", file=sys.stderr, flush=True)
        for pid in workers:
            os.kill(pid, signal.SIGTERM if received == signal.SIGHUP else received)

    def _workers(self) -> list[int]:
        import psutil

        workers = []
        for child in psutil.Process().children():
            try:
                if self._module in child.cmdline():
                    workers.append(child.pid)
            except psutil.NoSuchProcess:
                continue  # ended between the listing and the question
        return workers


def run_workers(cfg: RunConfig, nodes: Nodes, module: str, arguments: list[str], *, debug: bool = False) -> int:
    """Start ``python -m module arguments`` once per process of this node and wait for all of them.

    Returns:
        0 if all ended well; 2 if a worker reported a user's error; else the first failed worker's code (128 + n when
        signal n ended it).
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if not debug:
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    alone = nodes.master is None
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
    relay = SignalRelay(module)
    relay.install()
    try:
        elastic_launch(launch_config, sys.executable)("-u", "-m", module, *arguments)
    except ChildFailedError as error:
        return _exit_code(error, relay)
    return 0


def _exit_code(error: object, relay: SignalRelay) -> int:
    failures = getattr(error, "failures", {})
    codes = {rank: failure.exitcode for rank, failure in failures.items()}
    if VpmoeError.exit_code in codes.values():
        return VpmoeError.exit_code
    rank, code = min(codes.items(), key=lambda item: failures[item[0]].timestamp)
    if code >= 0:
        print(f"worker {rank} failed with exit code {code}; its own message is above", file=sys.stderr)
        return code
    name = signal.Signals(-code).name
    if relay.received is not None:
        print(f"stopped by {relay.received.name} before the workers could save", file=sys.stderr)
    else:
        hint = " (often the kernel, when memory runs out)" if name == "SIGKILL" else ""
        print(f"worker {rank} was ended by {name}{hint}", file=sys.stderr)
    return 128 - code


def share_cores(processes: int) -> None:
    """Set OMP_NUM_THREADS for ``processes`` workers on this machine's cores, unless the user has decided."""
    from megatron_vpmoe.runtime import device

    if "OMP_NUM_THREADS" not in os.environ and not device.has_gpu():
        os.environ["OMP_NUM_THREADS"] = str(max(1, len(os.sched_getaffinity(0)) // processes))
