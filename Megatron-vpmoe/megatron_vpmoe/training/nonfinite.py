"""Where a number first was not finite: the step is done once more, with an eye on every module."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime import distributed, pulse
from megatron_vpmoe.training.run import Run
from megatron_vpmoe.training.step import global_totals, run_micro_batches


class _Seen(NamedTuple):
    """Of one rank, the module with the first output that is not finite; and the one whose output's gradient is the
    first on the way back."""

    output: str | None
    gradient: str | None


def first_nonfinite(run: Run, batches: list[Batch]) -> str | None:
    """The module whose output was the first that is not finite, or else whose output's gradient was; a collective.

    Weights and buffers are left as they are, gradients are not. It costs nothing but here, on a step that has failed.

    Args:
        batches: of the step, this rank's.

    Returns:
        such as "the output of decoder.layers.3.mlp"; None: all outputs are finite, and so are their gradients.
    """
    buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]
    run.wrapped.zero_grad_buffer()
    with _Watching(run.model) as watching, pulse.unwatched():
        totals = global_totals(run.objective, batches)
        run_micro_batches(run.wrapped, run.objective, batches, totals, forward_only=False)
    with torch.no_grad():
        for buffer, as_it_was in buffers:
            buffer.copy_(as_it_was)
    # Stages follow each other as their ranks do: outputs first in the first one, gradients in the last.
    every = distributed.gathered(watching.seen())
    output = next((seen.output for seen in every if seen.output), None)
    gradient = next((seen.gradient for seen in reversed(every) if seen.gradient), None)
    if output is not None:
        return f"the output of {output}"
    return None if gradient is None else f"the gradient of the output of {gradient}"


class _Watching:
    """Looks at what each module gives; a synchronisation of the device for each."""

    def __init__(self, model: VPModel) -> None:
        self._model, self._output, self._gradient = model, list[str](), list[str]()
        self._hooks: list[Any] = []

    def __enter__(self) -> _Watching:
        for name, module in self._model.named_modules():
            if name:
                self._hooks.append(module.register_forward_hook(partial(self._look, self._model.absolute_name(name))))
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def seen(self) -> _Seen:
        return _Seen(next(iter(self._output), None), next(iter(self._gradient), None))

    def _look(self, name: str, _module: nn.Module, _given: Any, output: Any) -> None:
        for tensor in _tensors(output):
            if not bool(tensor.detach().isfinite().all()):
                self._output.append(name)
            elif tensor.requires_grad:
                tensor.register_hook(self._looking_at(name))

    def _looking_at(self, name: str) -> Callable[[Tensor], None]:
        def look(gradient: Tensor) -> None:
            if not bool(gradient.isfinite().all()):
                self._gradient.append(name)

        return look


def _tensors(output: Any) -> Iterator[Tensor]:
    """The numbers among what a module gives."""
    if isinstance(output, Tensor):
        if output.is_floating_point():
            yield output
    elif isinstance(output, tuple | list):
        for each in output:
            yield from _tensors(each)
