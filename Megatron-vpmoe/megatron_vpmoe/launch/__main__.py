"""Entry point of ``vpmoe train``, which is ``scripts/train.sh`` too."""

from __future__ import annotations

import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType

from megatron_vpmoe.errors import ConfigError, DeviceError, VpmoeError, of_the_system

WORKER_MODULE = "megatron_vpmoe.pretrain"


def launch(arguments: list[str], *, debug: bool) -> int:
    """Check and run; `arguments` are the words after ``vpmoe train``.

    Raises:
        VpmoeError: any error that the user can mend.
    """
    # Imports take seconds, in which a signal may come already.
    from megatron_vpmoe.config import load_config
    from megatron_vpmoe.config.memory import describe_geometry
    from megatron_vpmoe.launch import preflight
    from megatron_vpmoe.launch.workers import Nodes, run_workers, share_cores
    from megatron_vpmoe.planning import here

    dry_run = "--dry-run" in arguments
    words = [word for word in arguments if word not in ("--dry-run", "--debug")]
    if not words or words[0].startswith("--"):
        raise ConfigError(
            "no configuration given", source="command line", remedy="vpmoe train configs/nano/stage1.yaml"
        )
    config_path, overrides = Path(words[0]), words[1:]
    nodes = Nodes.from_environment()
    cfg = load_config(config_path, overrides, nodes=nodes.count)
    if dry_run:
        print(cfg.to_yaml())
        cfg, notes = preflight.without_missing_teacher(cfg)
        report = preflight.machine_report(cfg)
        print(describe_geometry(cfg, on_cpu=report.device_kind == "CPU", teacher=preflight.teacher_of(cfg)))
        if cfg.training.teacher_server is not None:
            print(f"the teacher is {cfg.training.served_model} at {cfg.training.teacher_server}: no memory here")
        print(*notes, sep="\n", end="\n" * bool(notes))
        print(f"{'fits' if report.fits else 'does not fit'}: {report}")
        return 0 if report.fits else DeviceError.exit_code
    report = preflight.check_machine(cfg, config_path)
    preflight.check_dataset(cfg)
    preflight.check_suites(cfg)
    preflight.check_served_teacher(cfg)
    if nodes.rank == 0:  # whose worker owns the directory, perhaps by the time that another node looks
        preflight.check_run_directory(cfg)
    share_cores(cfg.parallel.nproc_per_node)
    if nodes.rank == 0:
        print(here.announcement(cfg, nodes.count, report.device_kind), flush=True)
    worker_arguments = [str(config_path), *overrides, *(["--debug"] if debug else [])]
    return run_workers(cfg, nodes, WORKER_MODULE, worker_arguments, debug=debug)


@contextmanager
def _nothing_to_save() -> Iterator[None]:
    """SIGUSR1 asks a run to save and go on: before it has begun, and once it is over, it ends nothing."""

    def tell(_signum: int, _frame: FrameType | None) -> None:
        print("SIGUSR1: there is nothing to save yet", file=sys.stderr, flush=True)

    before = signal.signal(signal.SIGUSR1, tell)
    try:
        yield
    finally:
        signal.signal(signal.SIGUSR1, before)


@contextmanager
def _read_by_head() -> Iterator[None]:
    """Whoever reads what is printed may stop early: then this process ends, and says nothing."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
        sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, before)  # a caller's connections may break without ending it


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    arguments = sys.argv[1:] if arguments is None else arguments
    helping = not {"--help", "-h"}.isdisjoint(arguments)
    debug = "--debug" in arguments
    try:
        with _read_by_head() if helping or "--dry-run" in arguments else nullcontext():
            if helping:
                from megatron_vpmoe.launch.reference import help_text

                print(help_text())
                return 0
            with _nothing_to_save():
                return launch(arguments, debug=debug)
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except (VpmoeError, OSError) as error:
        if debug:
            traceback.print_exc()
        shown = of_the_system(error) if isinstance(error, OSError) else error
        print(f"error: {shown}", file=sys.stderr)
        return shown.exit_code


if __name__ == "__main__":
    sys.exit(main())
