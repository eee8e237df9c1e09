"""Is this tree slower than a reference commit? Whole training runs of both, by turns, on the same data.

    python scripts/bench/regress.py v1.2                         # a tag, a branch, a commit: against it
    python scripts/bench/regress.py HEAD --here=--deterministic=true   # in a clean tree: what a field costs
    python scripts/bench/regress.py main -- --compile layers     # both sides with fields of the configuration

The reference is checked out beside, in a temporary folder that is removed again; what is uncommitted here is part of
this side. Each round trains both in processes of their own, which of them first by turns, from the same configuration
file, with the same dataset, steps and threads. Read from each run's metrics: tokens/s and milliseconds of a step, the
median without the first steps; and the peak of memory, on a GPU where both sides tell it. Processor seconds, of a
whole run with its start, say more on a machine that does other things as well.

Prints one JSON object; ratios are this tree / reference, a round each (min, median, max). Exit code 1 where the median
of tokens/s falls, or that of memory rises, by more than the tolerance; 2 for what cannot be compared.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from beside import dataset

from megatron_vpmoe.metrics import read_records
from megatron_vpmoe.profiling.stopwatch import spread
from megatron_vpmoe.runtime import device

ROOT = Path(__file__).resolve().parents[2]
# The module is run only if it is that of the side's own tree, whatever else is installed.
_WORKER = """
import pathlib, runpy, sys
import megatron_vpmoe
tree = sys.argv.pop(1)
if pathlib.Path(tree) not in pathlib.Path(megatron_vpmoe.__file__).parents:
    sys.exit(f"megatron_vpmoe comes from {megatron_vpmoe.__file__}, not from {tree}")
runpy.run_module("megatron_vpmoe.pretrain", run_name="__main__", alter_sys=True)
"""


class Unequal(Exception):
    """The two sides cannot be compared; the message says why, and what to do."""


@dataclass
class Side:
    """One of the two trees, and what its runs gave."""

    name: str
    tree: Path
    flags: list[str]
    tokens_per_second: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    peak_memory_gib: list[float] = field(default_factory=list)
    processor_s: list[float] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)

    def run(self, config: Path, flags: list[str], folder: Path, threads: int, warm: int) -> None:
        """Train once and take the numbers."""
        run_dir = folder / f"{len(self.tokens_per_second)}_{self.name}"
        environment = os.environ | {
            "PYTHONPATH": f"{self.tree / 'Megatron-vpmoe'}{os.pathsep}{self.tree}",
            "OMP_NUM_THREADS": str(threads),
        }
        given = [str(self.tree), str(config), "--run-dir", str(run_dir), *flags, *self.flags]
        with tempfile.TemporaryFile("w+") as told:
            process = subprocess.Popen(
                [sys.executable, "-c", _WORKER, *given], stdout=told, stderr=told, env=environment
            )
            try:
                _, status, usage = os.wait4(process.pid, 0)
            except BaseException:  # interrupted: nobody else would end it
                process.kill()
                raise
            process.returncode = os.waitstatus_to_exitcode(status)
            if process.returncode:
                told.seek(0)
                raise Unequal(f"{self.name} ended with {process.returncode}:\n{told.read()[-3000:]}")
        values: dict[str, dict[int, float]] = {}
        for step, tag, value in read_records(run_dir / "metrics.jsonl"):
            values.setdefault(tag, {})[step] = value
        rates, tokens = values["throughput/tokens_per_second"], values["tokens/real"]
        steps = [step for step in rates if step > warm]
        self.tokens_per_second.append(statistics.median(rates[step] for step in steps))
        self.step_ms.append(statistics.median(1e3 * tokens[step] / rates[step] for step in steps))
        if not device.has_gpu():
            self.peak_memory_gib.append(usage.ru_maxrss / 2**20)
        elif told_gib := values.get("memory/peak_gib"):
            self.peak_memory_gib.append(max(told_gib.values()))
        self.processor_s.append(usage.ru_utime + usage.ru_stime)
        self.losses = list(values["loss/total"].values())


def git(*words: str) -> str:
    """What git says in this repository.

    Raises:
        Unequal: it refuses.
    """
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode or "is ambiguous" in done.stderr:
        raise Unequal(f"git {' '.join(words)}: {done.stderr.strip() or 'nothing'}")
    return done.stdout.strip()


def resolved(revision: str, here: list[str]) -> tuple[str, list[str]]:
    """The commit that ``revision`` names, and the files in which this tree differs from its own commit.

    Raises:
        Unequal: none, or one of several things, has that name; or both sides would be the same.
    """
    try:
        commit = git("rev-parse", "--verify", "--end-of-options", f"{revision}^{{commit}}")
    except Unequal as error:
        raise Unequal(f"{revision!r} names no commit here, or several things: {error}") from None
    changed = [line[3:] for line in git("status", "--porcelain").splitlines()]
    if not changed and not here and commit == git("rev-parse", "HEAD"):
        raise Unequal(f"{revision} is what this tree has, without a change: name another, or give --here a field")
    return commit, changed


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """The files of a commit, for as long as this lasts."""
    tree = folder / "reference"
    git("worktree", "add", "--detach", "--quiet", str(tree), commit)
    try:
        yield tree
    finally:
        git("worktree", "remove", "--force", str(tree))


def compare(arguments: argparse.Namespace) -> tuple[dict[str, object], bool]:
    """The printed object, and whether this tree is within the tolerance."""
    commit, changed = resolved(arguments.revision, arguments.here)
    with tempfile.TemporaryDirectory(prefix="regress-") as name, checked_out(commit, Path(name)) as tree:
        folder = Path(name)
        data = arguments.data_path or dataset(folder)
        fixed = {"data_path": Path(data).resolve(), "train_iters": arguments.warm + arguments.steps, "log_interval": 1}
        fixed |= {"nproc_per_node": 1, "wandb_mode": "disabled", "lr_warmup_iters": 1}
        fixed |= dict.fromkeys(("save_interval", "eval_interval", "sample_interval"), "null")
        given = {word.split("=")[0].lstrip("-").replace("-", "_") for word in arguments.overrides}
        flags = [f"--{key.replace('_', '-')}={value}" for key, value in fixed.items() if key not in given]
        flags += arguments.overrides
        sides = (Side("here", ROOT, arguments.here), Side("reference", tree, []))
        for number in range(arguments.rounds):
            for side in sides if number % 2 else sides[::-1]:
                side.run(Path(arguments.config).resolve(), flags, folder, arguments.threads, arguments.warm)
                print(f"round {number + 1}, {side.name}: {side.step_ms[-1]:.1f} ms a step", file=sys.stderr)
    here, reference = sides
    ratios = {
        what: spread([mine / its for mine, its in zip(getattr(here, what), getattr(reference, what), strict=True)])
        for what in ("tokens_per_second", "step_ms", "peak_memory_gib", "processor_s")
        if getattr(here, what) and getattr(reference, what)
    }
    within = ratios["tokens_per_second"]["median"] >= 1 - arguments.tolerance
    if "peak_memory_gib" in ratios:
        within &= ratios["peak_memory_gib"]["median"] <= 1 + arguments.tolerance
    apart = [abs(a / b - 1) for a, b in zip(here.losses, reference.losses, strict=True)]
    return {
        "against": commit[:12],
        "this_tree": f"{git('rev-parse', 'HEAD')[:12]}{f', {len(changed)} files changed' if changed else ''}",
        "fields_here": arguments.here,
        "device": device.device_name(),
        "threads": arguments.threads,
        "load_average": round(os.getloadavg()[0], 1),
        **{
            side.name: {
                "tokens_per_second": spread(side.tokens_per_second, 1),
                "step_ms": spread(side.step_ms, 1),
                "processor_s": spread(side.processor_s, 1),
                "peak_memory_gib": spread(side.peak_memory_gib) if side.peak_memory_gib else None,
            }
            for side in sides
        },
        "here_over_reference": ratios,
        "largest_difference_of_losses": max(apart),
        "tolerance": arguments.tolerance,
        "within": within,
    }, within


def main() -> int:
    """Parse the arguments and compare; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("revision", metavar="REV", help="reference: a commit, tag or branch of this repository")
    parser.add_argument("--config", default=str(ROOT / "configs" / "nano" / "stage1.yaml"))
    parser.add_argument("--data-path", help="a built dataset; default: one of generated arithmetic")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=12, help="of a run that are measured")
    parser.add_argument("--warm", type=int, default=3, help="of a run that go before them")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tolerance", type=float, default=0.05, help="share by which the median may be worse")
    parser.add_argument("--here", action="append", default=[], metavar="FLAG", help="a field for this side alone")
    parser.usage = "%(prog)s REV [options] [-- fields of the configuration, for both sides]"
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was checked out goes all the same
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:end])
    arguments.overrides = words[end + 1 :]
    try:
        told, within = compare(arguments)
    except Unequal as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    print(json.dumps(told, indent=1))
    return 0 if within else 1


if __name__ == "__main__":
    sys.exit(main())
