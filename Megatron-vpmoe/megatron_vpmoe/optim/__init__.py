"""How weights move: NorMuon with Polar Express for hidden matrices and experts, AdamW for the rest, and the schedules.

``assignment`` says which parameter goes where, ``build`` makes one Megatron optimizer of it, ``normuon`` is the step on
stacks that ``matrix_stacks`` gathers of what ``matrix_layout`` finds, ``sharded_state`` is how its state is
checkpointed.
"""

from megatron_vpmoe.optim.assignment import (
    AssignmentRow,
    assignment_table,
    render_assignment_table,
    write_assignment_table,
)
from megatron_vpmoe.optim.build import VpOptimizer, build_optimizer, describe_arithmetic
from megatron_vpmoe.optim.schedules import IterationScheduler, build_scheduler, learning_rates

__all__ = [
    "AssignmentRow",
    "IterationScheduler",
    "VpOptimizer",
    "assignment_table",
    "build_optimizer",
    "build_scheduler",
    "describe_arithmetic",
    "learning_rates",
    "render_assignment_table",
    "write_assignment_table",
]
