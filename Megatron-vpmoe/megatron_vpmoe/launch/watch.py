"""The launcher's eye on its workers: hands signals on, sees who leaves or is stopped, and names the first cause."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from types import FrameType

from megatron_vpmoe.runtime.endings import Ending

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_AT_ONCE = 2.0  # less than what the launcher gives those that are left


class Watch:
    """Looks at the workers of this process from a thread.

    SIGTERM, SIGINT and SIGHUP all become one SIGTERM for each worker, which finishes what it must, saves and exits by
    itself. After it only a further SIGINT counts: it ends the workers at once. With no worker started yet the launcher
    just exits.

    Args:
        module: what the workers run.
        count: how many there will be.

    Attributes:
        received: the last signal.
        gone: when each rank was found to have left, in that order.
        stopped: the ranks that have been stopped and not continued.
    """

    def __init__(self, module: str, count: int) -> None:
        self._module, self._count = module, count
        self._ranks: dict[int, int] = {}
        self._told: set[int] = set()
        self._looking = threading.RLock()
        self.received: signal.Signals | None = None
        self.gone: dict[int, float] = {}
        self.stopped: set[int] = set()

    def start(self) -> None:
        """Take over the three signals of this process (main thread only), and look from now on."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._handle)
        threading.Thread(target=self._keep_looking, name="watch", daemon=True).start()

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        again, self.received = self.received is not None, signal.Signals(signum)
        self.look()
        if not self._ranks and not self.gone:
            raise SystemExit(128 + signum)
        if again and signum != signal.SIGINT:
            return
        action = "stopping without a checkpoint" if again else "saving as soon as the step allows, then exiting"
        print(f"{self.received.name}: {action}", file=sys.stderr, flush=True)
        if again:
            for pid in list(self._ranks):
                _send(pid, signal.SIGKILL)

    def _keep_looking(self) -> None:
        while True:
            self.look()
            time.sleep(_SECONDS_BETWEEN_LOOKS)

    def look(self) -> None:
        """Look once: who is new, who has gone, who is stopped, who has not been told of a signal."""
        with self._looking:  # a signal may come in the middle of it
            self._look()

    def _look(self) -> None:
        import psutil

        if len(self._ranks) + len(self.gone) < self._count:
            for child in psutil.Process().children():
                try:
                    if self._module in child.cmdline():
                        self._ranks[child.pid] = int(child.environ()["RANK"])
                except (psutil.Error, KeyError):
                    continue  # ended between the listing and the question, or has not begun
        for pid, rank in list(self._ranks.items()):
            try:
                status = psutil.Process(pid).status()
            except psutil.NoSuchProcess:
                status = psutil.STATUS_ZOMBIE
            if status == psutil.STATUS_ZOMBIE:
                self._ranks.pop(pid, None)
                self.gone[rank] = time.time()
            elif status != psutil.STATUS_STOPPED:
                self.stopped.discard(rank)
            elif rank not in self.stopped:
                self.stopped.add(rank)
                what = f"worker {rank} is stopped (SIGSTOP); the others wait for it: kill -CONT {pid}"
                print(what, file=sys.stderr, flush=True)
            if self.received is not None and pid not in self._told:
                self._told.add(pid)
                _send(pid, signal.SIGTERM)

    def verdict(self, endings: Mapping[int, Ending], codes: Mapping[int, int]) -> int:
        """Say on stderr why the run failed, the first cause first; returns the exit code.

        Args:
            endings: what workers told of their end, by rank.
            codes: exit codes of those that failed, -n for signal n.
        """
        self.look()
        text, code, rank = self._first_cause(endings, codes)
        named = text if self._count == 1 or rank is None else f"worker {rank}: {text}"
        print(named, file=sys.stderr, flush=True)
        return code

    def _first_cause(self, endings: Mapping[int, Ending], codes: Mapping[int, int]) -> tuple[str, int, int | None]:
        of_kind = {
            kind: sorted((rank for rank in endings if endings[rank].kind == kind), key=lambda rank: endings[rank].at)
            for kind in ("error", "lost")
        }
        for rank in of_kind["error"]:
            return endings[rank].text, endings[rank].code, rank
        if self.received is not None:
            what = f"stopped by {self.received.name} before the workers had left; what is saved stands"
            return what, 128 + self.received, None
        lost = of_kind["lost"]
        if lost and self.stopped:
            return f"it waited in vain for worker {min(self.stopped)}, which is stopped (SIGSTOP)", 1, lost[0]
        gone = {rank: when for rank, when in self.gone.items() if rank not in endings}
        gone |= dict.fromkeys(codes.keys() - endings.keys() - self.gone.keys(), 0.0)  # too quick to be seen
        # Of those that left at about the first one's time: who failed before who ended well, before whom we ended.
        latest = min([*gone.values(), *(endings[rank].at for rank in lost)]) + _SECONDS_AT_ONCE
        silent = [rank for rank, when in gone.items() if when <= latest]
        for rank in sorted(silent, key=lambda rank: (codes.get(rank) == -signal.SIGTERM, rank not in codes)):
            code = codes.get(rank, 0)
            if code < 0:
                name = signal.Signals(-code).name
                hint = " (often the kernel, when memory runs out)" if name == "SIGKILL" else ""
                return f"it was ended by {name}{hint}", 128 - code, rank
            what = "before the run was done" if code == 0 else "; its own message is above"
            return f"it left with exit code {code} {what}", code or 1, rank
        for rank in lost:
            what = f"another process has left it ({endings[rank].text}); on several nodes look at the others' output"
            return what, 1, rank
        raise AssertionError(f"workers failed with exit codes {dict(codes)}")


def _send(pid: int, signum: signal.Signals) -> None:
    try:
        os.kill(pid, signum)
    except ProcessLookupError:
        return  # it was quicker
