"""``vpmoe profile``: check the environment, start the workers, write the summary. `--help` lists the variables."""

from __future__ import annotations

import datetime
import os
import platform
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_vpmoe.config import RunConfig, config_hash, load_config
from megatron_vpmoe.errors import ConfigError, DeviceError, VpmoeError
from megatron_vpmoe.files import json_bytes, write_atomically
from megatron_vpmoe.software import provenance

_USAGE = """usage: vpmoe profile [--field-name value ...]

Profile training steps on mock data, at a fixed geometry: one row of PROFILE_SEQ_LEN tokens a process and step, no
tensor or pipeline parallelism. Any field of the configuration can be overridden after that, as in vpmoe train.

  PROFILE_TOOL              torch (default) or nsys (NVIDIA Nsight Systems; needs a GPU)
  PROFILE_TRANSFORMER_IMPL  local (default); transformer_engine is refused: no layer is built of it
  PROFILE_NPROC_PER_NODE    processes (1)
  PROFILE_CONFIG            the run's YAML (configs/nano/stage1.yaml)
  PROFILE_SEQ_LEN           tokens a row (2048)
  PROFILE_EP                expert-parallel size (1)
  PROFILE_WARM_STEPS        steps before the first measured one (3)
  PROFILE_STEPS             steps of each pass: bare, clocked, traced (5)
  PROFILE_RUN               name of the run (the configuration's)

Traces go to artifacts/profiles/<date>/<hardware>/<tool>/<run>/, a summary to reports/perf/<run>_<hardware>_<tool>.json.
"""


@dataclass(frozen=True)
class Settings:
    """The environment, read and checked."""

    tool: str
    processes: int
    config: Path
    overrides: list[str]
    warm: int
    steps: int
    run: str


def settings(environment: dict[str, str], arguments: list[str]) -> Settings:
    """Read the ``PROFILE_*`` variables.

    Raises:
        ConfigError: a value that is not offered.
        DeviceError: Nsight Systems or a GPU is wanted and absent.
    """
    tool = environment.get("PROFILE_TOOL", "torch")
    if tool not in ("torch", "nsys"):
        raise ConfigError(f"there is no profiler {tool!r}", source="PROFILE_TOOL", remedy="torch or nsys")
    implementation = environment.get("PROFILE_TRANSFORMER_IMPL", "local")
    if implementation != "local":
        raise ConfigError(
            f"there are no layers of {implementation!r}: all are built of Megatron-Core's local parts",
            source="PROFILE_TRANSFORMER_IMPL",
            remedy="PROFILE_TRANSFORMER_IMPL=local",
        )
    if tool == "nsys":
        _check_nsys()
    config = Path(environment.get("PROFILE_CONFIG", "configs/nano/stage1.yaml"))
    numbers = {
        name: _count(environment, name, default)
        for name, default in (
            ("PROFILE_NPROC_PER_NODE", 1), ("PROFILE_SEQ_LEN", 2048), ("PROFILE_EP", 1), ("PROFILE_WARM_STEPS", 3),
            ("PROFILE_STEPS", 5),
        )
    }  # fmt: skip
    processes = numbers["PROFILE_NPROC_PER_NODE"]
    geometry = {
        "seq_length": numbers["PROFILE_SEQ_LEN"],
        "micro_batch_size": 1,
        "global_batch_size": processes,
        "nproc_per_node": processes,
        "expert_model_parallel_size": numbers["PROFILE_EP"],
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    given = {word.partition("=")[0].replace("-", "_") for word in arguments}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in geometry.items() if f"__{name}" not in given]
    run = environment.get("PROFILE_RUN", f"{config.parent.name}_{config.stem}")
    if not re.fullmatch(r"[\w.-]+", run):
        raise ConfigError(f"{run!r} is no name of a folder", source="PROFILE_RUN", remedy="letters, digits, . _ -")
    return Settings(
        tool, processes, config, [*flags, *arguments], numbers["PROFILE_WARM_STEPS"], numbers["PROFILE_STEPS"], run
    )


def _count(environment: dict[str, str], name: str, default: int) -> int:
    text = environment.get(name, str(default))
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise ConfigError(f"{name}={text!r} is not a number from 1 on", source=name, remedy=f"such as {default}")
    return int(text)


def _check_nsys() -> None:
    import torch

    if shutil.which("nsys") is None:
        raise DeviceError(
            "nsys (NVIDIA Nsight Systems) is not on the PATH",
            source="PROFILE_TOOL=nsys",
            remedy="install it from https://developer.nvidia.com/nsight-systems (apt: nsight-systems-cli in NVIDIA's "
            "CUDA repository), or PROFILE_TOOL=torch",
        )
    if not torch.cuda.is_available():
        raise DeviceError(
            "Nsight Systems traces CUDA and this machine has no GPU",
            source="PROFILE_TOOL=nsys",
            remedy="PROFILE_TOOL=torch",
        )


def hardware() -> str:
    """A folder's name for this machine: the GPU, or the processor's architecture and cores."""
    import torch

    if torch.cuda.is_available():
        return re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-").lower()
    return f"cpu-{platform.machine()}-{os.cpu_count()}cores"


def launch(wanted: Settings) -> int:
    """Start the workers under the profiler; returns their exit code."""
    date = datetime.date.today().isoformat()
    directory = Path("artifacts/profiles") / date / hardware() / wanted.tool / wanted.run
    directory.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m"]
    if wanted.processes > 1:
        command += ["torch.distributed.run", "--standalone", f"--nproc-per-node={wanted.processes}", "-m"]
    command += ["megatron_vpmoe.profiling", *wanted.overrides]
    if wanted.tool == "nsys":
        nsys = ["nsys", "profile", "--trace=cuda,nvtx", "--capture-range=cudaProfilerApi", "--capture-range-end=stop"]
        command = [*nsys, "--force-overwrite=true", f"--output={directory / 'trace'}", *command]
    environment = {**os.environ, "PROFILE_DIRECTORY": str(directory)}
    return subprocess.run(command, env=environment, check=False).returncode


def work(wanted: Settings, cfg: RunConfig, directory: Path) -> None:
    """One worker: measure, and on rank 0 write the summary."""
    from megatron_vpmoe.runtime import distributed

    distributed.initialize(seed=cfg.training.seed, expert_model_parallel_size=cfg.parallel.expert_model_parallel_size)
    import torch

    from megatron_vpmoe.profiling.capture import Subject, Window, capture

    trace = directory / f"rank{distributed.rank()}" if wanted.processes > 1 else directory
    trace.mkdir(exist_ok=True)
    found = capture(Subject(cfg), trace, Window(wanted.warm, wanted.steps), tool=wanted.tool)
    if distributed.rank() == 0:
        summary = {
            "kind": "profile",
            "run": wanted.run,
            "provenance": provenance(config_hash=config_hash(cfg)),
            "date": datetime.date.today().isoformat(),
            "hardware": hardware(),
            "tool": wanted.tool,
            "threads": torch.get_num_threads(),
            "load_average": round(os.getloadavg()[0], 1),
            "config": str(wanted.config),
            "overrides": wanted.overrides,
            "processes": wanted.processes,
            **found,
        }
        report = Path("reports/perf") / f"{wanted.run}_{hardware()}_{wanted.tool}.json"
        write_atomically(report, json_bytes(summary))
        print(f"{summary['tokens_per_second']:,.0f} tokens/s, {found['step_ms']['median']:.1f} ms a step; ms by range:")
        print("  " + "  ".join(f"{name} {value:.1f}" for name, value in found["split_ms"].items()))
        if (told := found["communication_ms"]) is not None:
            print(f"  {told['total']:.1f} ms in collectives, {told['exposed']:.1f} of them not covered by computation")
        print(f"trace in {directory}, summary in {report}")
    distributed.shutdown()


def main(arguments: list[str] | None = None) -> int:
    """Launcher, or worker where the launcher has set PROFILE_DIRECTORY."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if any(argument in ("-h", "--help") for argument in arguments):
        print(_USAGE, end="")
        return 0
    try:
        directory = os.environ.get("PROFILE_DIRECTORY")
        wanted = settings(dict(os.environ), [] if directory else arguments)
        cfg = load_config(wanted.config, arguments if directory else wanted.overrides, nodes=1)
        if directory is None:
            return launch(wanted)
        work(replace(wanted, overrides=arguments), cfg, Path(directory))
    except VpmoeError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
