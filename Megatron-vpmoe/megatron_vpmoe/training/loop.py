"""The loop: from a configuration to a trained model, readable from top to bottom. It knows no task."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING

from megatron_vpmoe.errors import VpmoeError
from megatron_vpmoe.metrics import (
    METRICS,
    ExpertLoadFile,
    MetricStream,
    RunStoreSink,
    Sink,
    open_loads,
    open_sinks,
    records_until,
)
from megatron_vpmoe.metrics.run_store import check_store, store_path
from megatron_vpmoe.model.moe.router_health import check_thresholds
from megatron_vpmoe.optim import learning_rates
from megatron_vpmoe.runtime import distributed, pulse
from megatron_vpmoe.runtime.signals import Interrupted, StopRequest
from megatron_vpmoe.sources import check_collapse
from megatron_vpmoe.training.failure_policy import go_back, judge, notices_of
from megatron_vpmoe.training.passes import Passes, is_due, without
from megatron_vpmoe.training.progress import Progress
from megatron_vpmoe.training.resources import StepClock, memory_of_ranks, timed
from megatron_vpmoe.training.router import RouterMonitor
from megatron_vpmoe.training.run import Run, open_run
from megatron_vpmoe.training.run_directory import ownership
from megatron_vpmoe.training.step import train_step
from megatron_vpmoe.training.throughput import Throughput

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


def train(cfg: RunConfig, of_pace: Callable[[float | None], str | None] = lambda _: None) -> Run:
    """Train as ``cfg`` says; process groups must exist. Returns the finished (or politely stopped) run.

    Args:
        cfg: the run.
        of_pace: what is said at the end of the median seconds of a step.

    Raises:
        BusyError: another process trains in the run directory.
        NotOursError, DataError: the run store is none, or cannot be used.
        VpmoeError: a served teacher is away; what was trained is saved.
    """
    is_main = distributed.rank() == 0
    with ExitStack() as held:
        former = distributed.from_rank_0(lambda: held.enter_context(ownership(cfg.run_directory)))
        distributed.from_rank_0(lambda: check_store(store_path(cfg.logging.run_store), cfg.run_directory))
        run = open_run(cfg)
        held.enter_context(pulse.watched(cfg.stall_timeout))  # until what follows is closed
        held.callback(run.source.close)
        if former is not None:
            run.notes += (f"the run before, process {former.get('pid')} on {former.get('host')}, ended abruptly",)
        # From here on there is something to save; a signal before ends the process as it would any other.
        stop, event = StopRequest(*notices_of(run)).install(), dict[str, float]()
        while True:
            sinks, loads = list[Sink](), list[ExpertLoadFile]()
            with MetricStream(sinks, loads, run.elapsed.place) as metrics:
                distributed.from_rank_0(partial(_open_metrics, run, sinks, loads))
                progress = Progress(cfg, start=run.iteration, enabled=is_main)
                spike = _train(run, stop, metrics, progress, of_pace, event)
                event = go_back(run) if spike else {}
            if not spike:
                return run


def _train(
    run: Run,
    stop: StopRequest,
    metrics: MetricStream,
    progress: Progress,
    of_pace: Callable[[float | None], str | None],
    event: dict[str, float],
) -> bool:
    """From the run's step to the last one, or until it is stopped; or to a spike, to be rolled back (True).

    ``event``: further metrics of the first step.
    """
    cfg, last = run.cfg, run.cfg.training.train_iters
    routers, clock = RouterMonitor(run.model, cfg), StepClock(run.model)
    passes = Passes(run, metrics, progress, stop)
    throughput = Throughput(cfg, run.optimizer.normuon_flops())
    progress.opened(run)
    if throughput.note:
        progress.note(throughput.note)
    stopping = False
    run.heed(stop)
    try:
        passes.make(passes.left())
        throughput.restart()
        check = stop.check()
        while run.iteration < last and not stopping:
            batches, position, of_source = run.source.next_step()
            with _by_all_ranks(run, progress):
                for warning in check_collapse(of_source, cfg):
                    progress.note(warning)
            throughput.updating()
            run.objective.begin_step(run.iteration + 1)
            routers.reset()
            logged = is_due(run.iteration + 1, cfg.logging.log_interval, last)
            with clock.listening(logged):
                result = train_step(
                    run.wrapped, run.optimizer, run.objective, batches, check, run.spikes.accepts, measure=logged
                )
            if result.updated:
                run.objective.end_step(result.metrics)
            with _by_all_ranks(run, progress):
                goes_back, of_spike = judge(run, result, batches, metrics, progress.note)
            if goes_back:
                run.position = position
                _settle(run, progress)
                progress.close()
                return True
            rates = learning_rates(run.scheduler, run.assignment, cfg) if logged else {}
            run.scheduler.step(1)
            run.iteration += 1
            run.position = position
            throughput.step(result.metrics["tokens/real"], batches)
            run.elapsed.tokens += result.metrics["tokens/real"]
            _settle(run, progress, wait=False)
            stopping, saving = stop.agreed_to_save()
            step, event = run.iteration, {**event, **of_spike}

            if event:  # once the step's tokens are counted: where it lies is recorded with its first metrics
                metrics.log(step, event)
                event = {}
            if logged:
                health = routers.metrics(result.metrics["tokens/real"])
                values = {**result.metrics, "grad_norm": result.grad_norm, **rates, **throughput.report(), **health}
                values |= {"skipped_steps": float(run.skipped_steps), **of_source}
                values |= {**result.groups, **clock.report(throughput.waited), **memory_of_ranks()}
                metrics.log(step, values)
                metrics.log_loads(step, routers.load_LE)
                progress.step(step, values)
                with _by_all_ranks(run, progress):
                    for warning in check_thresholds(health, cfg):
                        progress.note(warning)
            passes.make(passes.due(last))
            if is_due(step, cfg.checkpoint.save_interval, last) or step == last or stopping or saving:
                _save(run, metrics, progress)
            throughput.restart()
    except Interrupted as interrupted:
        stopping, cause = True, interrupted.__cause__
        why = stop.why if cause is None else "it cannot go on"
        later = f"; when it goes on it makes up for {', '.join(run.left)}" if run.left else ""
        progress.note(f"{why}: what came after step {run.iteration} is left out{later}")
        if run.iteration > run.saved:
            _save(run, metrics, progress)
        if cause is not None:
            _settle(run, progress)
            raise cause from None
    _settle(run, progress)
    is_stopped = stopping and (run.iteration < last or bool(run.left))
    progress.finished(run.iteration, stopped=stop.why if is_stopped else None)
    if (said := of_pace(throughput.typical_step)) is not None:
        progress.note(said)
    return False


def _open_metrics(run: Run, sinks: list[Sink], loads: list[ExpertLoadFile]) -> None:
    """Where metrics go from the run's step on, one by one: what has been opened is closed where the next one fails."""
    kept = without(run.left, run.iteration, records_until(run.directory / METRICS, run.iteration))
    place = {"step": run.iteration, "kept": kept, "world_size": distributed.world_size()}
    sinks.append(RunStoreSink(run.cfg, run.directory, provenance=run.provenance, **place))
    sinks.extend(open_sinks(run.cfg, run.directory, kept))
    loads.extend(open_loads(run.cfg, run.directory, resume_step=run.iteration))


def _save(run: Run, metrics: MetricStream, progress: Progress) -> None:
    """A checkpoint at the run's step, before which its metrics are on disk; a collective."""
    _settle(run, progress)
    metrics.sync()
    with timed(metrics, run.iteration, "saving"):
        run.save()
    _settle(run, progress, wait=False)


def _settle(run: Run, progress: Progress, *, wait: bool = True) -> None:
    """Tell of a checkpoint that was being written, once it stands; a collective."""
    if (saved := run.settle(wait=wait)) is not None:
        for note in saved.notes:
            progress.note(note)
        progress.saved(saved)


@contextmanager
def _by_all_ranks(run: Run, progress: Progress) -> Iterator[None]:
    """What every rank raises, or none: a checkpoint that is being written is there before the run ends of it."""
    try:
        yield
    except VpmoeError:
        _settle(run, progress)
        raise
