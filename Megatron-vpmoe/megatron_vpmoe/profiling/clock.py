"""The ranges of a step as profiles name them, and a listener that marks them in traces."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


def ranges_of(cfg: RunConfig) -> tuple[str, ...]:
    """The ranges of a training step, as the summary names them; what is in none of them is "other".

    Those between "forward" and "loss" are parts of the forward pass, and "forward" is what they leave of it.
    """
    return ("forward", *parts_of(cfg), "loss", "backward", "optimizer", "communication")


def parts_of(cfg: RunConfig) -> tuple[str, ...]:
    """The parts of a forward pass that the code marks, of models as this; what lies in a part counts to it."""
    if cfg.model.layer_type == "mixture":
        recall = () if cfg.model.memory_entries is None else ("recall",)
        experts = (f"experts.{expert.layer_type}" for expert in cfg.model.mixture_experts or ())
        return (*recall, "latent_attention", "router", *experts, "adapters")
    if cfg.model.layer_type == "state_space":
        return ("state_space",)
    if cfg.model.layer_type == "denoiser":
        return ("context", "estimate")
    is_moe = {cfg.is_moe_layer(number) for number in range(1, cfg.model.num_layers + 1)}
    dense = ("feed_forward",) if False in is_moe else ()
    shared = ("shared_expert",) if cfg.moe.moe_shared_expert_intermediate_size is not None else ()
    return ("attention", *dense, *(("dispatch", "router", "experts", *shared) if True in is_moe else ()))


class TraceMarks:
    """Each range as an entry of torch's trace and, on a GPU, as an NVTX range for Nsight Systems.

    Attributes:
        names: of all that have begun.
    """

    def __init__(self) -> None:
        self._open: list[Any] = []
        self.names: set[str] = set()

    def enter(self, name: str) -> None:
        self.names.add(name)
        mark = torch.profiler.record_function(name)
        mark.__enter__()
        self._open.append(mark)
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_push(name)

    def leave(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.nvtx.range_pop()
        self._open.pop().__exit__(None, None, None)
