"""What feeds a run dies: batches, a sampling, rewards, a teacher, a checkpoint's writer. It ends the run, by name."""

from __future__ import annotations

import importlib
import subprocess
import threading
from pathlib import Path
from typing import Any, NoReturn

import pytest

from tests import training_runs
from tests.fixtures_dataset import small_dataset
from tests.golden.test_resume_grpo import SAMPLED
from tests.tiny import random_batch
from tests.training_runs import ENVIRONMENT, command
from tests.workers import Started

pytestmark = pytest.mark.slow
RUN = {"train_iters": 6, "save_interval": 2, "sample_interval": None, "eval_interval": None}
OF_ANSWERS = {**SAMPLED, **RUN, "rollout_epochs": 1, "router_replay": "off"}
FEEDERS: dict[str, tuple[str, dict[str, Any]]] = {
    "batches": ("sources.stored:_Rows.micro_batch", RUN),
    "sampling": ("sources.rewarded:Rewarded._sample", {**OF_ANSWERS, "rollout_staleness": 1}),
    "reward": ("", {**OF_ANSWERS, "rewards": [{"function": "tests.training_runs:fails"}]}),
    "writer": ("training.checkpoint_part:Part.write", RUN),
    "seal": ("training.retention:Retention.prune", RUN),
}
"""What is called on a thread, but for a reward, and a run that calls it."""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return small_dataset(tmp_path_factory.mktemp("data") / "set", train=12, valid=4)


def feeder_dies_here(how: str) -> NoReturn:
    raise SystemExit(7) if how == "leaves" else ArithmeticError("of its own")


def run_whose_feeder_dies(arguments: list[str], place: str, how: str) -> NoReturn:
    """With its second call on a thread; a reward with its first."""
    if place:
        module, _, names = place.partition(":")
        of, name = names.split(".")
        owner = getattr(importlib.import_module(f"megatron_vpmoe.{module}"), of)
        whole, calls = getattr(owner, name), 0

        def called(*given: Any, **named: Any) -> Any:
            nonlocal calls
            calls += threading.current_thread() is not threading.main_thread()
            return feeder_dies_here(how) if calls > 1 else whole(*given, **named)

        setattr(owner, name, called)
    else:
        training_runs.fails = lambda sample: feeder_dies_here(how)
    training_runs._run(arguments)


@pytest.mark.parametrize("how", ["leaves", "raises"])
@pytest.mark.parametrize("feeder", FEEDERS)
def test_what_feeds_a_run_ends_it_with_its_own_cause(dataset: Path, tmp_path: Path, feeder: str, how: str) -> None:
    place, fields = FEEDERS[feeder]
    arguments = command(tmp_path / "run", dataset, **fields)[3:]
    done = Started(run_whose_feeder_dies, arguments, place, how, environment={}).finish(timeout=100)
    told = {"leaves": "it left with exit code 7", "raises": "ArithmeticError: of its own"}[how]
    if feeder == "reward":
        told = {"leaves": "the reward fails failed with SystemExit: 7", "raises": f"with {told}"}[how]
    assert done.returncode != 0 and told in done.stderr, done.stderr
    assert feeder == "reward" or "in feeder_dies_here" in done.stderr, done.stderr


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("how", ["leaves", "raises"])
def test_a_thread_that_asks_a_teacher_is_heard_of_where_its_answer_is_waited_for(how: str) -> None:
    from megatron_vpmoe.runtime.signals import Interrupted
    from megatron_vpmoe.sources import Served
    from vpmoe.teacher.daemons import Daemons

    class Server:
        threads = Daemons(2)

        def ask(self, passage: Any) -> Any:
            return self.threads.submit(lambda: feeder_dies_here(how))

        def close(self) -> None:
            self.threads.close()

    server = Server()
    with pytest.raises(Interrupted) as ended:
        Served(server, 0)([random_batch(2, 24, 60, 1)])
    server.close()
    assert isinstance(ended.value.__cause__, SystemExit if how == "leaves" else ArithmeticError)


NEVER = """
import os, time

def never(sample):
    if os.environ["RANK"] != "0":
        raise AssertionError("rewards are rank 0's")
    time.sleep(10_000)
"""


def test_a_reward_that_never_returns_is_named_with_its_stack(dataset: Path, tmp_path: Path) -> None:
    (tmp_path / "rewards_of_mine.py").write_text(NEVER)
    fields = {**OF_ANSWERS, "rewards": [{"function": "rewards_of_mine:never"}], "nproc_per_node": 2}
    words = command(tmp_path / "run", dataset, stall_timeout_seconds=8, **fields)
    words[2] = "megatron_vpmoe.launch"
    environment = {**ENVIRONMENT, "PYTHONPATH": f"{tmp_path}:{ENVIRONMENT['PYTHONPATH']}"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 1, done.stderr
    told = [line for line in done.stderr.splitlines() if "worker" in line]
    assert told[0].startswith("worker 0: no sign of life for"), done.stderr
    first, other = done.stderr.split("-- stack of worker 0:")[1].split("-- stack of worker 1:")
    assert "in never" in first and "rewards_of_mine.py" in first and "in never" not in other, done.stderr
    assert "from_rank_0" in other, done.stderr
