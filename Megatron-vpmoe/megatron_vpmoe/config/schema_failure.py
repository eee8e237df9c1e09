"""The section that says what becomes of a run in which something goes wrong, or which has to end early."""

from __future__ import annotations

from typing import Annotated, Literal

from megatron_vpmoe.config.schema_section import Cardinal, PositiveFloat, Section, Text, within

Minutes = Annotated[float, within(0.01, 1e6, "no job has that long")]


class FailureSection(Section):
    """Hangs, spikes of the loss, and notices that the time is up."""

    stall_timeout_seconds: Annotated[int, within(1, 604_800, "a dead run would not be noticed for a week")] | None = (
        None
    )
    """Seconds without a sign of life from any process of a machine (a micro-batch, a sampled token, a piece of a
    checkpoint or of a compilation) after which the run ends with the stacks of all; null: half of
    distributed_timeout_minutes."""
    spike_policy: Literal["off", "warn", "skip", "stop", "rollback"] = "warn"
    """A loss far above those before it: say so, drop the step, end the run, or go back to a checkpoint and on with
    other data."""
    spike_threshold: PositiveFloat = 12.0
    """A spike is more robust standard deviations (1.4826 x median absolute deviation) above the median than this."""
    spike_window: Annotated[int, within(4, 10_000, "they are sorted at each step")] = 64
    """Finished steps whose losses a loss is held against."""
    spike_history: Annotated[int, within(4, 10_000, "no spike would ever be seen")] = 32
    """Losses that there have to be before one can be a spike."""
    spike_limit: Cardinal = 0
    """Of "skip" and "rollback": dropped steps or rollbacks after which the next spike ends the run."""
    preemption_file: Text | None = None
    """When this file appears on one of the machines, the run saves and exits 0; null: none is looked for."""
    time_budget_minutes: Minutes | None = None
    """The run saves and exits 0 before so many minutes since its start are over; null: as long as it takes."""
