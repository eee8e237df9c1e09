"""A run: everything the loop works with, opened from a configuration, saved to and restored from checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel

from megatron_vpmoe.annotation import REFERENCE_LOG_P
from megatron_vpmoe.data.blend import open_parts
from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.files import write_atomically
from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.objectives import Objective, build_objective, check_kinds
from megatron_vpmoe.optim import (
    AssignmentRow,
    IterationScheduler,
    VpOptimizer,
    assignment_table,
    build_optimizer,
    build_scheduler,
    write_assignment_table,
)
from megatron_vpmoe.runtime import distributed, stages
from megatron_vpmoe.runtime.signals import StopRequest
from megatron_vpmoe.sources import (
    Annotated,
    AnnotatedBatches,
    Annotator,
    Batches,
    Beside,
    Position,
    Rollouts,
    Source,
    ValidSource,
    check_needs,
    open_held_out,
    open_source,
)
from megatron_vpmoe.training import checkpoint
from megatron_vpmoe.training.carried import carried_by
from megatron_vpmoe.training.checkpoint_hashes import with_all_ranks
from megatron_vpmoe.training.elapsed import Elapsed
from megatron_vpmoe.training.evaluate import Validation, validation
from megatron_vpmoe.training.frozen import check_stored_reference, find_annotators
from megatron_vpmoe.training.implementation import implementation_notes
from megatron_vpmoe.training.initial_weights import load_initial
from megatron_vpmoe.training.provenance import collect_provenance
from megatron_vpmoe.training.retention import Retention
from megatron_vpmoe.training.run_directory import continued
from megatron_vpmoe.training.spikes import Spikes
from megatron_vpmoe.training.suites import OpenedSuite, open_suites

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


@dataclass
class Run:
    """The parts of a run and its position.

    Attributes:
        valid: what gives the metrics of a validation pass, a collective, by their prefix: "valid", or "valid/<name>"
            for each dataset of a blend.
        valid_dataset: the first of them, whose prompts are answered.
        annotators: second models that annotate batches.
        rollouts: the source where answers of the model are trained on; validation is then of rewards.
        suites: evaluation suites.
        assignment: which parameter goes to which optimizer.
        iteration: finished optimizer steps.
        position: gives that of the source after them (skipped steps included); see ``Step``.
        elapsed: tokens and seconds of training so far, over all the times that the run was continued.
        skipped_steps: steps dropped under ``nonfinite_policy: skip``.
        left: passes of the step (``training.passes``) that are still to be made.
        saved: the iteration of the newest checkpoint, also of one that is being written; 0 where there is none.
        saving: the checkpoint that is being written.
        restored_from: the checkpoint that this run continues, if any.
        notes: lines about the restore, for the log.
        carried: what the weights brought along, for every checkpoint of the run.
        spikes: what the loss of a step is held against.
        longest_save: seconds that a checkpoint took at most; 0 before the first.
    """

    cfg: RunConfig
    directory: Path
    model: VPModel
    wrapped: DistributedDataParallel
    optimizer: VpOptimizer
    scheduler: IterationScheduler
    objective: Objective
    source: Source
    valid: dict[str, Validation]
    valid_dataset: KDDataset
    annotators: list[Annotator]
    rollouts: Rollouts | None
    suites: list[OpenedSuite]
    provenance: dict[str, Any]
    assignment: list[AssignmentRow]
    iteration: int = 0
    position: Callable[[], Position] = lambda: Position(0, [])
    elapsed: Elapsed = field(default_factory=Elapsed)
    skipped_steps: int = 0
    left: list[str] = field(default_factory=list)
    saved: int = 0
    saving: checkpoint.Saving | None = None
    restored_from: Path | None = None
    notes: tuple[str, ...] = ()
    carried: checkpoint.Carried | None = None
    longest_save: float = 0.0
    spikes: Spikes = field(init=False)
    retention: Retention = field(init=False)

    def __post_init__(self) -> None:
        keep = self.cfg.checkpoint
        self.spikes = Spikes(self.cfg.failure)
        self.retention = Retention(
            self.directory / "checkpoints",
            keep_last=keep.keep_last,
            keep_every=keep.keep_every,
            restored_from=self.restored_from,
        )

    def heed(self, stop: StopRequest) -> None:
        """Let what runs a model between updates be stopped; a collective."""
        for annotator in self.annotators:
            annotator.heed(stop)
        if self.rollouts is not None:
            self.rollouts.stop, self.rollouts.check = stop, stop.check()

    def save(self) -> None:
        """Begin to write a checkpoint of this position, after which those no longer kept are dropped; a collective.

        One that is still being written is waited for first; this one at once, without ``async_save``.
        """
        self.settle()
        position = self.position()
        state = {
            "iteration": self.iteration,
            "consumed_samples": position.consumed_samples,
            "data": position.data,
            "skipped_steps": self.skipped_steps,
            "left": self.left,
            "elapsed": self.elapsed.place(),
            "spikes": self.spikes.state(),
            "objective": {"name": self.cfg.training.objective, "state": self.objective.state()},
            "world_size": distributed.world_size(),
            "config": self.cfg.model_dump(mode="json"),
            "provenance": self.provenance,
        }
        self.saving = checkpoint.save(
            self.directory / "checkpoints",
            state,
            self.model,
            self.optimizer,
            self.scheduler,
            arrays=position.arrays,
            carried=self.carried,
            copy=self.cfg.checkpoint.async_save,
            then=self.retention.prune,
        )
        self.saved = self.iteration
        if not self.cfg.checkpoint.async_save:
            self.saving.wait()

    def settle(self, *, wait: bool = True) -> checkpoint.Saving | None:
        """The checkpoint that was being written, once it stands; a collective.

        Args:
            wait: until it stands; else None where it does not yet.

        Raises:
            VpmoeError: a rank could not write it; on every rank the same.
        """
        saving = self.saving
        if saving is None or not (saving.wait() if wait else saving.advance()):
            return None
        self.saving = None
        self.longest_save = max(self.longest_save, saving.seconds)
        return saving


def open_run(cfg: RunConfig) -> Run:
    """Build every part of a run, and continue from its newest complete checkpoint if the configuration says so.

    A collective; rank 0 must own the run directory (``run_directory.ownership``).

    Raises:
        CheckpointError: the run directory holds checkpoints and ``resume`` is off, or only damaged ones; or they are
            of another model, vocabulary or dataset.
        DataError, TokenizerError: the dataset is unusable or does not fit the model, or a suite lacks something.
    """
    directory = cfg.run_directory
    found, notes = with_all_ranks(lambda: continued(cfg))
    data_parallel = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    train, valid_parts = (open_parts(cfg, split) for split in ("train", "valid"))
    objective = build_objective(cfg)
    wanted = objective.needs.annotations
    source = open_source(train, cfg, *data_parallel, wanted)
    rollouts = source if isinstance(source, Rollouts) else None
    stored: dict[str, Batches] = {
        "valid" if len(valid_parts) == 1 else f"valid/{part.name}": ValidSource(part, cfg, *data_parallel, wanted)
        for part in valid_parts
        if rollouts is None
    }
    held_out = open_held_out(valid_parts, cfg)
    second = find_annotators(cfg, train[0].dataset.manifest)
    for each in second:
        source = Annotated(source, each.annotator)
        stored = {prefix: AnnotatedBatches(batches, each.annotator) for prefix, batches in stored.items()}
    check_kinds(objective, cfg, [part.dataset.manifest for part in (*train, *valid_parts)])
    if REFERENCE_LOG_P in objective.needs.annotations and cfg.training.reference_weights is None:
        for part in (*train, *valid_parts):
            check_stored_reference(cfg, part.dataset.manifest)
    for name, gives in {"train": source, **stored}.items():
        check_needs(cfg.training.objective, objective.needs, gives, source=name)
    suites = open_suites(cfg, [part.dataset.manifest for part in train])
    model = build_model(cfg)
    started_from = found
    if found is None:
        # Before the optimizer, whose fp32 masters are copies of the weights.
        started_from, of_weights = load_initial(model, cfg)
        notes += of_weights
    if rollouts is not None:
        ahead, minutes = cfg.rollouts.rollout_staleness, cfg.parallel.distributed_timeout_minutes
        rollouts.open(model, Beside(model, build_model(cfg), minutes) if ahead else None)
    wrapped = wrap_for_training(model, cfg)
    optimizer = build_optimizer([wrapped], cfg)
    # After the model that is trained, whose first weights are drawn from the seed.
    notes += [each.open() for each in second]
    run = Run(
        cfg=cfg,
        directory=directory,
        model=model,
        wrapped=wrapped,
        optimizer=optimizer,
        scheduler=build_scheduler(optimizer, cfg),
        objective=objective,
        source=source,
        valid={
            **{prefix: validation(model, objective, batches) for prefix, batches in stored.items()},
            **({"valid": partial(held_out.measure, model)} if held_out else {}),
        },
        valid_dataset=valid_parts[0].dataset,
        annotators=[each.annotator for each in second],
        rollouts=rollouts,
        suites=suites,
        provenance=collect_provenance(cfg, [part.dataset.manifest for part in train]),
        notes=(*notes, *implementation_notes(model, cfg)),
        carried=carried_by(started_from, [part.dataset.manifest for part in train], cfg),
        restored_from=found.path if found else None,
        assignment=[row for stage in stages.gather_stages(assignment_table(model, cfg)) for row in stage],
    )

    def describe() -> None:
        write_atomically(directory / "config.yaml", cfg.to_yaml().encode())
        write_assignment_table(run.assignment, directory / "assignment.json")

    distributed.from_rank_0(describe)
    if found is not None:
        _restore(run, found)
    return run


def _restore(run: Run, found: checkpoint.Found) -> None:
    checkpoint.load(found, run.model, run.optimizer, run.scheduler)
    run.iteration = run.saved = found.iteration
    consumed, data = int(found.state["consumed_samples"]), found.state.get("data", [])
    position = Position(consumed, data, checkpoint.load_arrays(found))
    run.position = lambda: position
    run.skipped_steps = int(found.state["skipped_steps"])
    run.left = [name for name in found.state.get("left", []) if isinstance(name, str)]
    if (elapsed := Elapsed.since(found.state.get("elapsed"))) is None:
        run.notes += ("the checkpoint counts neither tokens nor seconds: both are counted from here on",)
    else:
        run.elapsed = elapsed
    run.spikes.restore(found.state.get("spikes", {}))
    run.notes += tuple(
        run.source.resume(
            position,
            source=str(found.path / "run_state.json"),
            allow_change=run.cfg.checkpoint.allow_provenance_change,
        )
    )
    kept = found.state.get("objective", {})
    if kept.get("name") == run.cfg.training.objective:
        run.objective.restore(kept["state"])
    if found.state["world_size"] != distributed.world_size():
        run.notes += (
            f"saved by {found.state['world_size']} processes, continued by {distributed.world_size()}: "
            "same data order and draws",
        )
