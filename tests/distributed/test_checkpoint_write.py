"""What one rank has met is no riddle to the others: a file that it cannot write, a teacher's server that is gone."""

from __future__ import annotations

import resource
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from megatron_vpmoe.errors import CheckpointError, VpmoeError
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.signals import Interrupted, StopRequest
from megatron_vpmoe.training import torch_dist
from tests.tiny import random_batch
from tests.workers import run_workers
from tests.written_part import write_part

pytestmark = pytest.mark.slow


Heard = tuple[list[dict[str, torch.Tensor]], int, list[str]]


def _saved_and_heard(folder: str) -> tuple[list[tuple[str, int]], Heard]:
    return _save(folder), _hear()


@pytest.fixture(scope="module")
def of_ranks(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[list[tuple[str, int]], Heard]]]:
    folder = tmp_path_factory.mktemp("ranks")
    return folder, run_workers(2, _saved_and_heard, str(folder), folder=folder)


def _save(folder: str) -> list[tuple[str, int]]:
    distributed.initialize(seed=1)
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    rank, results = distributed.rank(), []
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for limited_rank in (None, 0, 1):
        if rank == limited_rank:  # as on a full disk: a write fails in the middle of a file
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        path, said = Path(folder) / str(limited_rank), ""
        path.mkdir(exist_ok=True)
        tensor = ShardedTensor.from_rank_offsets("w", torch.ones(1, 9000), (0, rank, 2))
        try:
            write_part(path, {"w": tensor})
        except CheckpointError as error:
            said = str(error)
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        results.append((said, len(psutil.Process().children())))
    return results


def test_what_fails_on_one_rank_is_told_by_all_and_nothing_is_forked(of_ranks: tuple[Path, list]) -> None:
    folder, found = of_ranks
    for (sound, first, second), _ in found:
        assert sound == ("", 0)
        for limited_rank, (said, children) in enumerate((first, second)):
            assert "File too large" in said and f"rank {limited_rank}" in said and str(folder) in said
            assert children == 0
    assert torch_dist.Reader(folder / "None").tensor("w").sum() == 18_000


def _hear() -> Heard:
    """What ranks of one model hear of a served teacher, and how much each asks; then how both end."""
    from megatron.core import parallel_state

    from megatron_vpmoe.sources import Passage, Served
    from megatron_vpmoe.teacher_records import Records
    from tests.unit.megatron_vpmoe.sources.test_served import LastFirst

    class Noisy(LastFirst):
        def said_of(self, passage: Passage) -> Records:  # as a server that batches otherwise each time
            ids, log_p, of_label = super().said_of(passage)
            return ids, log_p, of_label + np.float32(np.random.rand())

    class Dying(LastFirst):
        def ask(self, passage: Passage) -> Future[Records]:
            future: Future[Records] = Future()
            if distributed.rank() == 1:
                threading.Timer(0.2, lambda: future.set_exception(VpmoeError("the server is gone"))).start()
            return future  # the other rank's never ends

    class Silent(LastFirst):
        def ask(self, passage: Passage) -> Future[Records]:
            return Future()

    def end_of(server: LastFirst, stop: StopRequest) -> str:
        teacher = Served(server, 2)
        teacher.heed(stop)
        try:
            teacher([random_batch(2, 24, 60, seed=distributed.rank())])
        except Interrupted as interrupted:
            return str(interrupted.__cause__)
        return "it did not end"

    np.random.seed(distributed.rank())
    server, told = Noisy(2), []
    for split in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        parallel_state.destroy_model_parallel()
        distributed.initialize(seed=1, **{split: 2})
        told += Served(server, 2)([random_batch(2, 24, 60, seed=1)])
    parallel_state.destroy_model_parallel()
    distributed.initialize(seed=1)
    began, asked_to_stop = time.monotonic(), StopRequest()
    ends = [end_of(Dying(2), StopRequest())]
    if distributed.rank() == 0:
        threading.Timer(0.2, lambda: asked_to_stop._handle(signal.SIGTERM, None)).start()
    ends.append(end_of(Silent(2), asked_to_stop))
    assert time.monotonic() - began < 30
    return told, len(server.passages), ends


def test_ranks_hear_of_a_served_teacher_and_leave_it_together(of_ranks: tuple[Path, list]) -> None:
    (_, (told, asked, ends)), (_, (other, asked_by_second, others)) = of_ranks[1]
    assert asked and not asked_by_second and ends == others == ["the server is gone", "None"]
    for mine, theirs in zip(told, other, strict=True):
        assert all(torch.equal(values, theirs[name]) for name, values in mine.items())
