"""The launcher's eye on its workers: hands signals on, sees who leaves, is stopped or hangs, names the first cause."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from types import FrameType

from megatron_vpmoe.launch.life import Life, catches, send, together, waits_for_others
from megatron_vpmoe.runtime import endings
from megatron_vpmoe.runtime.endings import Ending

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_AT_ONCE = 2.0  # less than what the launcher gives those that are left
_SECONDS_HELD = 5.0  # between two looks: this process was stopped, and perhaps the workers with it
_HINTS = {
    "SIGKILL": " (often the kernel, when memory runs out)",
    "SIGBUS": " (a file that it reads by mapping was cut short, or its disk failed)",
    "SIGABRT": " (on GPUs often NCCL, when a collective has waited for distributed_timeout_minutes)",
}


class Watch:
    """Looks at the workers of this process from a thread.

    SIGTERM, SIGINT and SIGHUP all become one SIGTERM for each worker, which finishes what it must, saves and exits by
    itself. After it only a further SIGINT counts: it ends the workers at once. With no worker started yet the launcher
    just exits. SIGUSR1 is handed on to one worker: all save and go on.

    Args:
        module: what the workers run.
        count: how many there will be.
        folder: where they tell their ends and show signs of life.

    Attributes:
        received: the last signal that asked for an end.
        gone: when each rank was found to have left, in that order.
        stopped: the ranks that have been stopped and not continued.
    """

    def __init__(self, module: str, count: int, folder: Path) -> None:
        self._module, self._count, self._folder, self._life = module, count, folder, Life(folder)
        self._ranks: dict[int, int] = {}
        self._told: set[int] = set()
        self._looking, self._ended = threading.RLock(), threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, name="watch", daemon=True)
        self._looked = self._since = time.monotonic()
        self._stall: tuple[str, int | None] | None = None
        self._stacks: dict[int, str] | None = None
        self.received: signal.Signals | None = None
        self.gone: dict[int, float] = {}
        self.stopped: set[int] = set()

    def start(self) -> None:
        """Take over the four signals of this process (main thread only), and look from now on."""
        for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(signum, self._handle)
        signal.signal(signal.SIGUSR1, self._hand_on)
        self._thread.start()

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
            self._end()

    def _hand_on(self, _signum: int, _frame: FrameType | None) -> None:
        self.look()
        ready = [pid for pid in list(self._ranks) if catches(pid, signal.SIGUSR1)]
        action = "saving as soon as the step allows, then going on" if ready else "there is nothing to save yet"
        print(f"SIGUSR1: {action}", file=sys.stderr, flush=True)
        for pid in ready[:1]:  # It tells the others, which by signals of their own could save a step later once more.
            send(pid, signal.SIGUSR1)

    def _keep_looking(self) -> None:
        while not self._ended.wait(_SECONDS_BETWEEN_LOOKS):
            self.look()

    def end(self) -> None:
        """Look no more: the folder goes."""
        self._ended.set()
        self._thread.join()

    def look(self) -> None:
        """Look once: who is new, who has gone, is stopped or hangs, who has not been told of a signal."""
        with self._looking:  # a signal may come in the middle of it
            self._look()
            self._ask_for_stacks()

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
                if self._stacks is None:  # for its stack it had to go on
                    self.stopped.discard(rank)
            elif rank not in self.stopped and self._stacks is None:
                self.stopped.add(rank)
                what = f"worker {rank} is stopped (SIGSTOP); the others wait for it: kill -CONT {pid}"
                print(what, file=sys.stderr, flush=True)
            if self.received is not None and pid not in self._told:
                self._told.add(pid)
                send(pid, signal.SIGTERM)

    def _ask_for_stacks(self) -> None:
        """Once, as soon as one has failed or all hang; then these are ended."""
        now = time.monotonic()
        if now - self._looked > _SECONDS_HELD:
            self._since = now
        self._looked = now
        if self._stacks is not None:
            return
        pids = {rank: pid for pid, rank in self._ranks.items()}
        told = endings.told(self._folder)
        failed = self.gone.keys() - told.keys() or any(ending.kind != "done" for ending in told.values())
        stalled = not failed and self._life.is_stalled(pids, self._since)
        if failed or stalled:
            silence = {rank: self._life.silence(rank, self._since) for rank in pids}
            stopped, self._stacks = set(self.stopped), {}
            self._stacks = self._life.stacks({rank: pid for rank, pid in pids.items() if rank not in told})
        if stalled:
            self._stall = self._named(silence, stopped)
            self._end()

    def _named(self, silence: Mapping[int, float], stopped: set[int]) -> tuple[str, int | None]:
        """Who of those that show no sign of life holds up the others, and what is said of it."""
        seconds = min(silence.values())
        stacks = self._stacks or {}
        busy = [rank for rank in silence if not waits_for_others(stacks.get(rank, ""))]
        if suspects := sorted(stopped or busy, key=lambda rank: -silence[rank]):
            how = "it is stopped (SIGSTOP)" if stopped else "it hangs, or works where no sign of life is given"
            remedy = "mend what its stack shows; where it was at work, raise failure.stall_timeout_seconds (before the "
            remedy += "first step parallel.distributed_timeout_minutes)"
            return f"no sign of life for {seconds:.0f} s: {how}\n  remedy: {remedy}", suspects[0]
        what = "all wait for other processes: of another machine, see its output, or each for another collective"
        return f"no sign of life for {seconds:.0f} s: {what}", None

    def _end(self) -> None:
        for pid in list(self._ranks):
            send(pid, signal.SIGKILL)

    def verdict(self, endings: Mapping[int, Ending], codes: Mapping[int, int]) -> int:
        """Say on stderr why the run failed, the first cause first, then where each worker was; returns the exit code.

        Args:
            endings: what workers told of their end, by rank.
            codes: exit codes of those that failed, -n for signal n.
        """
        self.look()
        text, code, rank = self._first_cause(endings, codes)
        named = text if self._count == 1 or rank is None else f"worker {rank}: {text}"
        stacks = dict(self._stacks or {}) | self._life.crashed(codes)
        stacks |= {each: ending.stack for each, ending in endings.items() if ending.stack}
        # A user's error says all that there is to say.
        where = together(stacks, first=rank) if self._stall or code != 2 else ""
        print(named, where, sep="\n" if where else "", file=sys.stderr, flush=True)
        return code

    def _first_cause(self, endings: Mapping[int, Ending], codes: Mapping[int, int]) -> tuple[str, int, int | None]:
        if self._stall is not None:
            return self._stall[0], 1, self._stall[1]
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
        # Who has failed and told no failure: also after its end, as the libraries of torch and of a GPU are torn down.
        afterwards = {rank for rank in codes if rank in endings and endings[rank].kind == "done"}
        gone = {rank: when for rank, when in self.gone.items() if rank not in endings or rank in afterwards}
        gone |= dict.fromkeys((codes.keys() - endings.keys() | afterwards) - self.gone.keys(), 0.0)  # not seen leaving
        # Of those that left at about the first one's time: who failed before who ended well, before whom we ended.
        latest = min([*gone.values(), *(endings[rank].at for rank in lost)]) + _SECONDS_AT_ONCE
        silent = [rank for rank, when in gone.items() if when <= latest]
        for rank in sorted(silent, key=lambda rank: (codes.get(rank) == -signal.SIGTERM, rank not in codes)):
            code = codes.get(rank, 0)
            if code < 0:
                name = signal.Signals(-code).name
                when = " after the run was done" if rank in afterwards else ""
                return f"it was ended by {name}{when}{_HINTS.get(name, '')}", 128 - code, rank
            what = "before the run was done" if code == 0 else "; its own message is above"
            return f"it left with exit code {code} {what}", code or 1, rank
        # Those that did not answer and are not in a collective themselves.
        hung = [
            rank for rank, text in (self._stacks or {}).items() if rank not in endings and not waits_for_others(text)
        ]
        for rank in lost:
            if hung:
                return f"it waited in vain for worker {hung[0]}, which hangs ({endings[rank].text})", 1, rank
            what = f"another process has left it ({endings[rank].text}); on several nodes look at the others' output"
            return what, 1, rank
        raise AssertionError(f"workers failed with exit codes {dict(codes)}")
