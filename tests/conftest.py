"""What every test shares: Megatron-Core is prepared for this machine before anything imports it."""

from __future__ import annotations

import atexit
import gc
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

# Small tensors: one thread computes them faster than two, and worker processes do not compete.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
from hypothesis import HealthCheck, settings

from megatron_vpmoe.runtime.device import prepare

prepare()
gc.freeze()  # what is imported stays: a collection need not look at it

REPOSITORY = Path(__file__).resolve().parent.parent
os.environ["PYTHONPATH"] = str(REPOSITORY)  # processes that tests start import `tests`, wherever they start
# Runs of tests register themselves apart from those of whoever runs the tests.
_RUN_STORE = tempfile.mkdtemp(prefix="vpmoe_runs_")
os.environ["VPMOE_RUN_STORE"] = f"{_RUN_STORE}/registry.sqlite"
_OWNER = os.getpid()
_fuzz_factor = 1


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fuzz", type=int, default=1, metavar="N", help="fuzzers draw N times as many examples")


def pytest_configure(config: pytest.Config) -> None:
    global _fuzz_factor
    _fuzz_factor = config.getoption("--fuzz")


def pytest_collection_finish() -> None:
    if workers := sys.modules.get("tests.workers"):  # some test uses them
        workers.start_fork_server()


# A machine that runs other things beside the tests is slow, and nothing is wrong with it.
settings.register_profile("suite", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("suite")


def fuzz_settings(max_examples: int) -> settings:
    """Decorates a fuzzer above ``@given``: the same examples every time, N times as many with ``--fuzz N``."""
    return settings(
        max_examples=max_examples * _fuzz_factor,
        derandomize=True,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return REPOSITORY


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Groups are kept from one test that wants them to the next; any other test starts without."""
    if "single_process" not in getattr(item, "fixturenames", ()):
        _leave_groups()


def pytest_sessionfinish() -> None:
    _leave_groups()


@atexit.register
def _remove_run_store() -> None:
    if os.getpid() == _OWNER:  # and not a process forked from here
        shutil.rmtree(_RUN_STORE, ignore_errors=True)


def _leave_groups() -> None:
    if "torch" in sys.modules and sys.modules["torch"].distributed.is_initialized():
        from megatron_vpmoe.runtime import distributed

        distributed.shutdown()


@pytest.fixture
def single_process() -> None:
    """Process groups of a job of one, and every generator seeded."""
    import torch

    from megatron_vpmoe.runtime import distributed

    if torch.distributed.is_initialized():
        distributed.seed_rank(1234)
    else:
        distributed.initialize(seed=1234)


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """By torch's compiler before, and nothing left behind."""
    import torch
    from torch._dynamo.utils import counters

    from megatron_vpmoe.model import compilation

    for clear in (compilation._compiled.cache_clear, torch._dynamo.reset, counters.clear):
        clear()
    yield
    compilation._compiled.cache_clear()
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def fresh_balance_loss_scale(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream keeps the scale of the router's loss in a class; a backward pass outside its schedules leaves one there
    that its schedules cannot write to."""
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    monkeypatch.setattr(MoEAuxLossAutoScaler, "main_loss_backward_scale", None)
