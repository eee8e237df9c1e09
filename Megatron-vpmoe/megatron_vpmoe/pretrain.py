"""One worker of a run: ``python -m megatron_vpmoe.pretrain CONFIG [--any-field value]``, started by torchrun.

``vpmoe train`` checks the run first and starts the workers; this entry point is the same under plain torchrun.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from typing import TYPE_CHECKING

from megatron_vpmoe.runtime import pulse

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

PR_SET_PDEATHSIG = 1  # linux/prctl.h


def run(arguments: list[str]) -> None:
    """Load the configuration, join the other processes, train, leave them."""
    from megatron_vpmoe.config import load_config

    cfg = load_config(arguments[0], arguments[1:])
    with pulse.watched(cfg.startup_timeout):
        _run(cfg)


def _run(cfg: RunConfig) -> None:
    from functools import partial

    from megatron_vpmoe.config import check_world
    from megatron_vpmoe.planning import here
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training.loop import train

    world = int(os.environ.get("WORLD_SIZE", "1"))
    check_world(cfg, world)
    distributed.refuse_old_addresses()
    parallel = cfg.parallel
    distributed.initialize(
        seed=cfg.training.seed,
        tensor_model_parallel_size=parallel.tensor_model_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_model_parallel_size,
        expert_model_parallel_size=parallel.expert_model_parallel_size,
        timeout_minutes=parallel.distributed_timeout_minutes,
        deterministic=cfg.training.deterministic,
    )
    if distributed.is_restarted_group():
        cfg = cfg.model_copy(update={"checkpoint": cfg.checkpoint.model_copy(update={"resume": True})})
    predicted = here.predicted(cfg, max(1, world // parallel.nproc_per_node))
    train(cfg, partial(here.comparison, predicted))
    with pulse.watched(cfg.stall_timeout):  # a GPU's libraries wait for the other processes
        distributed.shutdown()


def _end_with_parent() -> None:
    """Have the kernel end this process when its parent dies: nobody else would, after a kill -9 of the parent."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.environ.get("VPMOE_LAUNCHER", str(os.getppid())) != str(os.getppid()):
        sys.exit(1)  # it was quicker


def main(arguments: list[str] | None = None) -> int:
    """Run, tell how it ended, and return the exit code: 2 for a user's error."""
    arguments = sys.argv[1:] if arguments is None else arguments
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    from megatron_vpmoe.runtime import endings

    try:
        run(arguments)
        ending = endings.ending_of(None)
    except BaseException as error:  # SystemExit too: who leaves early has others waiting
        ending = endings.ending_of(error, debug=debug)
    return endings.tell(ending)


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # until there is something to save; no traceback of an import
    pulse.begin(int(os.environ.get("RANK", "0")), os.environ.get("VPMOE_ENDINGS"))
    if "RANK" in os.environ:
        _end_with_parent()
    code = main()
    from megatron_vpmoe.runtime.endings import leave

    leave(code)
