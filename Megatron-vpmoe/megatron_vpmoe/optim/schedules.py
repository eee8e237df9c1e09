"""Learning rates over the iterations: Megatron's scheduler, counted in iterations, one peak per parameter group."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from megatron_vpmoe.optim.assignment import FROZEN, AssignmentRow, slug
from megatron_vpmoe.runtime import device

device.prepare()
from megatron.core.optimizer import MegatronOptimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

WSD_DECAY_STYLE = "linear"
"""Shape of the last phase of warmup-stable-decay."""


class IterationScheduler(OptimizerParamScheduler):
    """Upstream's schedule with two corrections.

    ``num_steps`` counts finished updates, so upstream's warm-up would spend the first update at a learning rate of 0;
    here update n of w warm-up updates (from 1) runs at n / w of the peak. Loading sets the position instead of adding
    to it; everything else comes from the configuration of the run that loads.
    """

    def get_lr(self, param_group: dict[str, Any]) -> float:
        """Learning rate of the next update of ``param_group``, from its ``max_lr`` and ``min_lr``."""
        if self.num_steps < self.lr_warmup_steps:
            return param_group["max_lr"] * (self.num_steps + 1) / self.lr_warmup_steps
        return super().get_lr(param_group)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue at the position of ``state_dict`` and set every group's learning rate for it."""
        self.num_steps = 0
        super().load_state_dict(state_dict)


def learning_rates(
    scheduler: IterationScheduler, assignment: Iterable[AssignmentRow], cfg: RunConfig
) -> dict[str, float]:
    """Of the next update: ``lr``, that of ``optim.lr``, and ``lr/<rule>`` of every rule with a trained parameter.

    Parameters of a rule with a multiplier have ``lr/<rule>/x<factor>``.
    """
    peaks = {"lr": cfg.optim.lr}
    for row in assignment:
        if row.optimizer != FROZEN:
            tag = f"lr/{slug(row.rule)}"
            peaks[tag if row.lr_multiplier == 1.0 else f"{tag}/x{row.lr_multiplier:g}"] = row.lr
    floor = cfg.optim.min_lr / cfg.optim.lr
    return {tag: scheduler.get_lr({"max_lr": peak, "min_lr": floor * peak}) for tag, peak in peaks.items()}


def build_scheduler(optimizer: MegatronOptimizer, cfg: RunConfig) -> IterationScheduler:
    """Warm-up, then cosine, linear, constant or WSD, for every group of ``optimizer``; ``step(1)`` after each update.

    Each group carries its own ``max_lr`` and ``min_lr``; the floor keeps the ratio ``min_lr / lr`` of the
    configuration, so that the embedding's and AdamW's learning rates stay in proportion to the end.
    """
    optim = cfg.optim
    for group in optimizer.param_groups:
        group["min_lr"] = optim.min_lr * group["max_lr"] / optim.lr
    return IterationScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=optim.lr,
        min_lr=optim.min_lr,
        lr_warmup_steps=optim.lr_warmup_iters,
        lr_decay_steps=cfg.decay_iters,
        lr_decay_style=optim.lr_decay_style,
        start_wd=1.0,  # constant; every group's decay is its wd_mult
        end_wd=1.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
        wsd_decay_steps=optim.lr_wsd_decay_iters,
        lr_wsd_decay_style=WSD_DECAY_STYLE,
    )
