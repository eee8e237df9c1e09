"""The machine at hand, for predictions of a run on it, and what is said of them before and after."""

from __future__ import annotations

import os

from megatron_vpmoe.config.schema import RunConfig
from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.planning.predict import Prediction, predict
from megatron_vpmoe.runtime.machines import Fleet, calibrated, calibrated_path, machine_of

CALIBRATE = "vpmoe plan --calibrate"


def here(cfg: RunConfig, nodes: int = 1, device_name: str | None = None) -> Fleet:
    """This machine, with the processes of the run.

    Args:
        cfg: the run.
        nodes: machines like this one.
        device_name: as the driver tells it, "CPU" without a GPU; None: to be asked for, which opens a GPU's context.

    Raises:
        DeviceError: its GPU is not in the table, or its CPU has not been measured.
    """
    from megatron_vpmoe.runtime import device

    processes = cfg.parallel.nproc_per_node
    name = device.device_name() if device_name is None else device_name
    if name != "CPU":
        machine = machine_of(name)
        if machine is None:
            raise DeviceError(
                f"{name!r} is not in runtime/machines.toml", source="the GPU's driver", remedy="add it there"
            )
    else:
        machine = calibrated(threads_of_process(processes))
        if machine is None:
            raise DeviceError("this CPU has not been measured", source=str(calibrated_path()), remedy=CALIBRATE)
    return Fleet(machine=machine, gpus=processes * nodes)


def threads_of_process(processes: int) -> int:
    """That each of a CPU's processes gets, as the launcher shares them out."""
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdecimal() and int(given) else max(1, len(os.sched_getaffinity(0)) // processes)


def predicted(cfg: RunConfig, nodes: int = 1, device_name: str | None = None) -> Prediction | str:
    """Of the run's step here; or why there is none, in one line. Arguments as of ``here``."""
    try:
        return predict(cfg, here(cfg, nodes, device_name))
    except DeviceError as error:
        return f"no prediction of the step: {error.what} ({error.remedy})"


def announcement(cfg: RunConfig, nodes: int = 1, device_name: str | None = None) -> str:
    """The line before a run starts; arguments as of ``here``."""
    found = predicted(cfg, nodes, device_name)
    if isinstance(found, str):
        return found
    training = cfg.training
    others = cfg.samples or training.teacher_weights is not None or training.teacher_server is not None
    alone = ", of the update alone: answers and teachers come on top" if others else ""
    speed = f"{found.step_seconds:.3g} s a step, {found.tokens_per_second:,.0f} tokens/s"
    return f"predicted: {speed}, padding included{alone}"


def comparison(found: Prediction | str, step_seconds: float | None) -> str | None:
    """The line after it; None where nothing was predicted or measured."""
    if isinstance(found, str) or step_seconds is None:
        return None
    ratio = step_seconds / found.step_seconds
    return f"predicted {found.step_seconds:.3g} s a step, measured {step_seconds:.3g} s: {ratio:.2f} times as long"
