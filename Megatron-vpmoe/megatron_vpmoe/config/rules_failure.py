"""Rules of what becomes of a run in which something goes wrong."""

from __future__ import annotations

from megatron_vpmoe.config.rule import Rule, refuse

_ACTS = ("skip", "rollback")

REFUSED: tuple[Rule, ...] = (
    refuse(
        "stall_timeout_seconds distributed_timeout_minutes",
        "{stall_timeout_seconds} s are not less than {distributed_timeout_minutes} min, after which collectives give "
        "up by themselves and no stack is told; lower it, or set null",
        lambda c: c.stall_timeout_seconds is not None and c.stall_timeout_seconds >= 60 * c.distributed_timeout_minutes,
    ),
    refuse(
        "spike_history spike_window",
        "{spike_history} losses never lie in a window of {spike_window}; lower it",
        lambda c: c.spike_history > c.spike_window,
    ),
    refuse(
        "spike_policy spike_limit",
        "the policy {spike_policy} does not go with a limit of {spike_limit}",
        lambda c: (c.spike_policy in _ACTS) != (c.spike_limit > 0),
    ),
    refuse(
        "spike_policy save_interval",
        "there would be no checkpoint to go back to; set save_interval",
        lambda c: c.spike_policy == "rollback" and c.save_interval is None,
    ),
)
"""Every rule of the section ``failure``."""
