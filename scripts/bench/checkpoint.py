"""What a checkpoint costs the training: written while it goes on (async_save), against one that it waits for.

    python scripts/bench/checkpoint.py                                   # 0.1 B parameters, 1.3 GB, one process
    torchrun --nproc-per-node 2 scripts/bench/checkpoint.py -- --nproc-per-node 2

Every round saves once on either side, in turns which is first, and takes steps after that on both sides: as many as an
asynchronous save needs until it stands. Of a side are told the seconds that training stood still (save, the questions
whether it stands, the wait at the end), and beside them how much longer its steps took than the median of three steps
of the same round without a save. The share is asynchronous over synchronous within a round: min / median / max over
rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.optim import build_scheduler
from megatron_vpmoe.profiling.capture import Subject
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.training import checkpoint
from megatron_vpmoe.training.retention import Retention

NANO = Path(__file__).resolve().parents[2] / "configs" / "nano" / "stage1.yaml"
SIZE = """--hidden-size 512 --moe-ffn-hidden-size 2048 --optimizer adam --seq-length 128 --micro-batch-size 1
    --global-batch-size 2 --nproc-per-node 1"""


class Cost(NamedTuple):
    """Seconds of one save."""

    stood_still: float
    slowed: float
    until_it_stood: float


class Bench:
    """A model in training, its checkpoints, and how long its steps take without them."""

    def __init__(self, cfg: RunConfig, folder: Path) -> None:
        self._subject = Subject(cfg)
        self._scheduler = build_scheduler(self._subject.optimizer, cfg)
        self._folder, self._saved = folder, 0
        self._retention = Retention(folder, keep_last=1, keep_every=None)
        self.step = 0.0
        """Seconds of a step without a save, as of the last ``settle_pace``."""

    def settle_pace(self) -> None:
        """Time some steps without a save."""
        self.step = statistics.median(self.steps(3))

    def steps(self, count: int) -> list[float]:
        """Seconds of each."""
        taken = []
        for _ in range(count):
            begin = time.perf_counter()
            self._subject.step()
            taken.append(time.perf_counter() - begin)
        return taken

    def save(self, *, copy: bool, steps: int = 1) -> tuple[Cost, int]:
        """Save, and go on for ``steps`` and until the checkpoint stands; returns the cost and the steps taken."""
        self._saved += 1
        begin = time.perf_counter()
        state = {"iteration": self._saved, "world_size": distributed.world_size()}
        parts = self._subject.model, self._subject.optimizer, self._scheduler
        saving = checkpoint.save(self._folder, state, *parts, copy=copy, then=self._retention.prune)
        stands = not copy and saving.wait().exists()
        still, taken = time.perf_counter() - begin, list[float]()
        while not stands or len(taken) < steps:
            taken += self.steps(1)
            begin = time.perf_counter()
            stands = saving.advance()
            still += time.perf_counter() - begin
        return Cost(still, sum(taken) - len(taken) * self.step, saving.seconds), len(taken)


def told(values: list[float], form: str) -> str:
    return " / ".join(format(value, form) for value in (min(values), statistics.median(values), max(values)))


def measure(bench: Bench, rounds: int) -> None:
    """Print what the rounds gave."""
    _, steps = bench.save(copy=True)
    waited, aside = list[Cost](), list[Cost]()
    for number in range(rounds):
        bench.settle_pace()
        for copy in (True, False) if number % 2 == 0 else (False, True):
            cost, taken = bench.save(copy=copy, steps=1 if copy else steps)
            (aside if copy else waited).append(cost)
            steps = taken
        if distributed.rank() == 0:
            still, slowed, stood = aside[-1]
            beside = f"{still:.2f} s still, steps {slowed:+.2f} s, there after {stood:.1f} s"
            print(
                f"step {bench.step:.2f} s; waited for: {waited[-1].stood_still:.2f} s still; beside: {beside}",
                flush=True,
            )
    if distributed.rank() == 0:
        pairs = list(zip(aside, waited, strict=True))
        still = [100 * one.stood_still / other.stood_still for one, other in pairs]
        whole = [100 * (one.stood_still + one.slowed) / (other.stood_still + other.slowed) for one, other in pairs]
        print(f"synchronous save {told([cost.stood_still for cost in waited], '.2f')} s")
        print(f"asynchronous over synchronous, training stands still: {told(still, '.1f')} %")
        print(f"the same with what steps take longer: {told(whole, '.1f')} %")


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--directory", type=Path, help="where checkpoints are written (and removed); default: temporary"
    )
    parser.add_argument("overrides", nargs="*", help="after --, fields of the configuration")
    arguments = parser.parse_args()
    given = {word.partition("=")[0] for word in arguments.overrides}
    words = SIZE.split()
    size = [f"{name}={value}" for name, value in zip(words[::2], words[1::2], strict=True) if name not in given]
    cfg = load_config(NANO, [*size, *arguments.overrides], nodes=1)
    torch.set_num_threads(arguments.threads)
    distributed.initialize(seed=1)
    with tempfile.TemporaryDirectory(dir=arguments.directory) as own:
        folder = Path(distributed.from_rank_0(lambda: own)) / "checkpoints"
        bench = Bench(cfg, folder)
        measure(bench, arguments.rounds)
        if distributed.rank() == 0:
            (found,) = folder.glob("iter_*")
            size = sum(file.stat().st_size for file in found.rglob("*")) / 1e9
            print(f"{size:.2f} GB, {distributed.world_size()} processes")
    distributed.shutdown()


if __name__ == "__main__":
    main()
