"""What becomes of a step whose loss or gradient is not finite, or whose loss lies far above those before it.

Every rank judges the same numbers, those of the global batch, and so all do the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from megatron_vpmoe.config.parameters import parameter_sizes
from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.errors import CheckpointError, NonFiniteError, SpikeError
from megatron_vpmoe.files import json_bytes, write_atomically
from megatron_vpmoe.metrics import MetricStream
from megatron_vpmoe.runtime import distributed, pulse
from megatron_vpmoe.runtime.notices import Notice, PreemptionFile, TimeBudget
from megatron_vpmoe.training import checkpoint
from megatron_vpmoe.training.checkpoint_files import by_age, damage, read_checkpoint, set_aside, write_tracker
from megatron_vpmoe.training.checkpoint_hashes import with_all_ranks
from megatron_vpmoe.training.elapsed import Elapsed
from megatron_vpmoe.training.nonfinite import first_nonfinite
from megatron_vpmoe.training.run import Run
from megatron_vpmoe.training.step import StepResult

_ACTIONS = {"warn": 1.0, "skip": 2.0, "stop": 3.0, "rollback": 4.0}
"""Values of the metric ``spike/action``."""
_WARNINGS_KEPT = 32
"""Spikes of a run that are trained on and of which each rank leaves a file: a loss that keeps jumping fills no disk."""


def notices_of(run: Run) -> list[Notice]:
    """What asks this run to save and end, besides a signal.

    Raises:
        ConfigError: one of them would end the run before its first step; on every rank.
    """
    cfg, notices = run.cfg.failure, list[Notice]()
    if cfg.preemption_file is not None:
        notices.append(PreemptionFile(Path(cfg.preemption_file)))
    if cfg.time_budget_minutes is not None:
        notices.append(TimeBudget(cfg.time_budget_minutes, partial(_seconds_of_save, run)))
    for notice in notices:
        distributed.on_every_rank(notice.refuse_early)
    return notices


def _seconds_of_save(run: Run) -> float:
    """Until a checkpoint that is begun now would stand, behind one that is being written; for the first, 5 s and as
    long as AdamW's state of every weight takes at 100 MB/s.
    """
    first = 5.0 + 16e-8 * sum(parameter_sizes(run.cfg).values())
    return (run.longest_save or first) * (1 if run.saving is None else 2)


def judge(
    run: Run, result: StepResult, batches: list[Batch], metrics: MetricStream, note: Callable[[str], None]
) -> tuple[bool, dict[str, float]]:
    """What is wrong with a step, if anything is; a collective.

    Returns:
        whether to go back (``go_back``); and the metrics of a spike that ends nothing, for the step's own.

    Raises:
        NonFiniteError, SpikeError: the run ends with this step; on every rank.
    """
    loss = result.metrics["loss/total"]
    if not math.isfinite(result.grad_norm):
        _nonfinite(run, result, batches, note)
        return False, {}
    if not run.spikes.found:
        run.spikes.finished(loss)
        return False, {}
    policy, limit = run.cfg.failure.spike_policy, run.cfg.failure.spike_limit
    action = "stop" if policy != "warn" and run.spikes.acted >= limit else policy
    step, z = run.iteration + 1, run.spikes.z
    found = {"spike/z": z, "spike/action": _ACTIONS[action]}
    what = f"the loss of step {step}, {loss:.4f}, is {z:.1f} robust standard deviations above those before it"
    if action == "warn":
        note(f"{what}: it is trained on{_kept_warning(run, result, batches)}")
        run.spikes.finished(loss)
        return False, found
    path = _dump_spike(run, result, batches, action)
    if action == "stop":
        metrics.log(step, found)
        done = {"skip": "dropped steps", "rollback": "rollbacks"}.get(policy)
        tried = f", after {run.spikes.acted} {done} (failure.spike_limit {limit})" if done else ""
        raise SpikeError(
            f"{what}{tried}",
            source=f"{path} (batch ids, the losses before)",
            remedy="look at these rows; lower the learning rate, raise failure.spike_threshold, or have such steps "
            "dropped or rolled back (failure.spike_policy with spike_limit)",
        )
    note(f"{what}: {'the step is dropped' if action == 'skip' else 'going back'} ({path})")
    run.spikes.acted += 1
    # Of a rollback they are of the step that is done in place of this one.
    return (True, {}) if action == "rollback" else (False, found)


def go_back(run: Run) -> dict[str, float]:
    """Go on from the newest checkpoint before the spike, with the data that come after it; a collective.

    A checkpoint that led to this spike already, by the rollback before, makes way for an older one if there is any.
    Newer ones are renamed ``.rolled_back``.

    Returns:
        the metrics of the rollback, for the first step after it.

    Raises:
        CheckpointError: there is no sound checkpoint; on every rank.
    """
    run.settle()
    position, spike = run.position(), run.iteration + 1
    with pulse.watched(run.cfg.startup_timeout):
        found = with_all_ranks(lambda: _before(run))
        checkpoint.load(found, run.model, run.optimizer, run.scheduler)
    run.iteration = run.saved = found.iteration
    run.elapsed = Elapsed.since(found.state.get("elapsed")) or run.elapsed
    run.restored_from = run.spikes.returned_to = found.path
    kept = found.state.get("objective", {})
    if kept.get("name") == run.cfg.training.objective:  # the run may have begun under another one
        run.objective.restore(kept["state"])
    run.source.forget()
    first = int(found.state["consumed_samples"])
    run.spikes.back(found.state.get("spikes", {}), [first, position.consumed_samples])
    run.position = lambda: position
    run.notes = (
        f"back from step {spike} for a spike of the loss: samples {first} to {position.consumed_samples} of the order "
        f"are passed over ({run.spikes.acted} of {run.cfg.failure.spike_limit})",
    )
    return {"spike/z": run.spikes.z, "spike/action": _ACTIONS["rollback"], "spike/from_step": float(spike)}


def _before(run: Run) -> checkpoint.Found:
    directory = run.directory / "checkpoints"
    sound = (path for path in by_age(directory) if damage(path) is None)
    newest = next(sound, None)
    if newest is None:
        raise CheckpointError(
            f"there is no sound checkpoint to go back to from the spike of step {run.iteration + 1}",
            source=str(directory),
            remedy="save more often (checkpoint.save_interval)",
        )
    target = next(sound, newest) if run.spikes.returned_to == newest else newest
    found = read_checkpoint(target, check_hashes=False)
    write_tracker(directory, found.iteration)  # first: after a kill it never names what is not there
    for path in by_age(directory):
        if path == target:
            break
        set_aside(path, "rolled_back")
    return found


def _dump_spike(run: Run, result: StepResult, batches: list[Batch], action: str) -> Path:
    return _dump(run, "spike", result, batches, {"z": run.spikes.z, "action": action, **run.spikes.state()})


def _kept_warning(run: Run, result: StepResult, batches: list[Batch]) -> str:
    """Where more stands of a spike that is trained on, for its line in the log; nothing of those past the limit."""
    if run.spikes.warned == _WARNINGS_KEPT:
        return ""
    run.spikes.warned += 1
    last = "; of further ones no file is written" if run.spikes.warned == _WARNINGS_KEPT else ""
    return f" ({_dump_spike(run, result, batches, 'warn')}{last})"


def _dump(run: Run, kind: str, result: StepResult, batches: list[Batch], more: dict[str, Any]) -> Path:
    """What led to a bad step, of this rank, in a file of its own."""
    step, rank = run.iteration + 1, distributed.rank()
    numbers = {"loss": result.metrics["loss/total"], "grad_norm": result.grad_norm}
    report = {
        "iteration": step,
        "rank": rank,
        **{name: value if math.isfinite(value) else str(value) for name, value in numbers.items()},
        "sample_ids": [sample for batch in batches for sample in batch.sample_ids],
        **more,
    }
    again = f"_{run.spikes.acted + 1}" if run.spikes.returned_to is not None else ""
    path = run.directory / f"{kind}_{step:07d}_rank{rank}{again}.json"
    write_atomically(path, json_bytes(report))
    return path


def _nonfinite(run: Run, result: StepResult, batches: list[Batch], note: Callable[[str], None]) -> None:
    """A step whose loss or gradient is not finite: dump what led to it, then drop the step or end the run."""
    training = run.cfg.training
    run.skipped_steps += 1
    parameters = [
        run.model.absolute_name(name)
        for name, parameter in run.model.named_parameters()
        if (grad := getattr(parameter, "main_grad", None)) is not None and not bool(grad.isfinite().all())
    ]
    where = first_nonfinite(run, batches)
    path = _dump(run, "nonfinite", result, batches, {"parameters": parameters, "module": where})
    what = "loss" if not math.isfinite(result.metrics["loss/total"]) else "gradient"
    first = [name for names in distributed.gathered(parameters) for name in names][:1]
    named = f", first in {where}" if where else f", first in {first[0]}" if first else ""
    what = f"the {what} of iteration {run.iteration + 1} is not finite{named}"
    if training.nonfinite_policy == "skip" and run.skipped_steps <= training.nonfinite_max_skips:
        note(f"{what}: the step is dropped ({path})")
        return
    raise NonFiniteError(
        what,
        source=f"{path} (batch ids, parameters with a non-finite gradient)",
        remedy="lower the learning rate, or nonfinite_policy: skip with nonfinite_max_skips to drop such steps",
    )
