"""Steps of stage 3 whose next sampling goes on beside the update (k = 1), against sampling in between (k = 0).

    python scripts/bench/beside.py                       # the nano stage 3, a thread each for trainer and sampler

Either side is a model, its teacher, an optimizer and a source of its own, in one process; every round times as many
steps of both, one after the other, in turns which is first. A side's time holds as many samplings as updates: k = 1
begins with one that is done, and waits for the last one. The ratio is k = 0 over k = 1 of a round (min / median / max
over rounds), by the wall and by the process's CPU time. Then the same with a teacher that waits before it answers, as
one behind a server does.

The model is untrained: every answer has ``rollout_max_new_tokens``, the most that a sampling can take.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from megatron_vpmoe.config import load_config
from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.data.blend import open_parts
from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.optim import build_optimizer
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.sources import Annotated, Beside, Rollouts, Teacher, open_source
from megatron_vpmoe.training.step import train_step
from vpmoe.cli import main as vpmoe

NANO = Path(__file__).resolve().parents[2] / "configs" / "nano" / "stage3.yaml"


class Waiting(Teacher):
    """A teacher that waits before it says of each batch what it would have said at once."""

    seconds = 0.0

    def __call__(self, batches: Sequence[Batch]) -> list[dict[str, Tensor]]:
        time.sleep(self.seconds * len(batches))
        return super().__call__(batches)


class Side:
    """A run of stage 3 without a loop around it."""

    def __init__(self, staleness: int, flags: list[str]) -> None:
        cfg = load_config(NANO, [*flags, "--rollout-staleness", str(staleness)], nodes=1)
        torch.manual_seed(1)
        model = build_model(cfg)
        source = open_source(open_parts(cfg, "train"), cfg, 0, 1)
        assert isinstance(source, Rollouts)
        source.open(model, Beside(model, build_model(cfg), 5) if staleness else None)
        self._wrapped, self._objective = wrap_for_training(model, cfg), build_objective(cfg)
        self._optimizer = build_optimizer([self._wrapped], cfg)
        self.teacher = Waiting(0, cfg.rollouts.rollout_temperature)
        self.teacher.open(build_model(cfg))
        self.source = Annotated(source, self.teacher)

    def steps(self, count: int) -> None:
        """So many steps and as many samplings."""
        for number in range(1, count + 1):
            step = self.source.next_step()
            train_step(self._wrapped, self._optimizer, self._objective, step.batches)
            if number == count:
                step.position()


def dataset(folder: Path, questions: int = 400) -> Path:
    """Conversations of generated arithmetic."""
    rows, conversations, built = (str(folder / name) for name in ("rows", "conversations", "kd"))
    vocabulary = ["--compact-vocab-size", "500", "--padded-vocab-size", "512", "--valid-fraction", "0.05"]
    build = ["--input-dir", conversations, "--output-dir", built, "--seq-len", "384", "--quiet"]
    with contextlib.redirect_stdout(io.StringIO()):
        told = [
            vpmoe(["data", "synth-mini", "--output-dir", rows, "--rows", str(questions)]),
            vpmoe(["data", "convert", "--input", rows, "--output-dir", conversations, "--num-shards", "1"]),
            vpmoe(["data", "build", *build, *vocabulary]),
        ]
    assert told == [0, 0, 0]
    return Path(built)


def measure(sides: list[Side], rounds: int, count: int, seconds: float) -> None:
    """Print one line of a delay."""
    clocks = {"wall": time.perf_counter, "CPU": time.process_time}
    spent = {clock: ([], []) for clock in clocks}
    for side in sides:
        side.teacher.seconds = seconds
        side.steps(1)
    for turn in range(rounds):
        for number in (0, 1) if turn % 2 == 0 else (1, 0):
            begin = {clock: now() for clock, now in clocks.items()}
            sides[number].steps(count)
            for clock, now in clocks.items():
                spent[clock][number].append((now() - begin[clock]) / count)
    print(f"a teacher that waits {seconds:g} s a batch; load {os.getloadavg()[0]:.1f}")
    for clock, (between, beside) in spent.items():
        ratios = sorted(one / other for one, other in zip(between, beside, strict=True))
        seconds_a_step = f"{statistics.median(between):.2f} s a step in between, {statistics.median(beside):.2f} beside"
        told = f"{ratios[0]:.2f} / {statistics.median(ratios):.2f} / {ratios[-1]:.2f}"
        print(f"    {clock}: {seconds_a_step}, ratio {told}", flush=True)


def main() -> None:
    """Parse the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="of a side in a round")
    parser.add_argument("--threads", type=int, default=1, help="of either thread's operations")
    parser.add_argument(
        "--delays", type=float, nargs="+", default=[0.0, 0.5], help="of the teacher, in seconds a batch"
    )
    parser.add_argument("overrides", nargs="*", help="after --, fields of the configuration")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder, distributed.single_process(seed=1):
        fields = f"--data-path {dataset(Path(folder))} --nproc-per-node 1 --teacher-weights none"
        bounds = "--collapse warn --collapse-length null --rewards null"
        sides = [Side(staleness, [*fields.split(), *bounds.split(), *arguments.overrides]) for staleness in (0, 1)]
        for seconds in arguments.delays:
            measure(sides, arguments.rounds, arguments.steps, seconds)
        for side in sides:
            side.source.close()


if __name__ == "__main__":
    main()
