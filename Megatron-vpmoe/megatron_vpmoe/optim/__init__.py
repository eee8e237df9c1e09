"""How weights move: NorMuon with Polar Express for hidden matrices and experts, AdamW for the rest, and the schedules.

``routing`` says which parameter goes where, ``build`` makes one Megatron optimizer of it, ``normuon`` is the step on
stacks that ``matrix_stacks`` gathers, ``sharded_state`` is how its state is checkpointed.
"""

from megatron_vpmoe.optim.build import VpOptimizer, build_optimizer, describe_arithmetic
from megatron_vpmoe.optim.routing import RoutingRow, render_routing_table, routing_table, write_routing_table
from megatron_vpmoe.optim.schedules import IterationScheduler, build_scheduler

__all__ = [
    "IterationScheduler",
    "RoutingRow",
    "VpOptimizer",
    "build_optimizer",
    "build_scheduler",
    "describe_arithmetic",
    "render_routing_table",
    "routing_table",
    "write_routing_table",
]
