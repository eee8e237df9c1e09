"""A sampling beside the updates: a thread of this process samples from a copy of the weights as they stood.

Between the two threads nothing passes but what ``begin`` is given and what it returns. What else they could share is
each one's own: process groups (``runtime/exchange.py``), the stream of a GPU, and in torch whatever belongs to a thread
(gradient mode, the device). Nothing of a sampling draws from a generator.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime import pulse, ranges
from megatron_vpmoe.runtime.device import has_gpu
from megatron_vpmoe.runtime.exchange import ExchangeAside
from megatron_vpmoe.runtime.signals import Interrupted
from megatron_vpmoe.sources.sampling import Sampler

T = TypeVar("T")


class Beside:
    """Samples beside the updates, one sampling at a time.

    Constructed by all ranks at the same time, on the thread that trains.

    Args:
        model: that is trained.
        copy: of its geometry; whatever its weights are.
        timeout_minutes: that a rank waits for the others.
    """

    def __init__(self, model: VPModel, copy: VPModel, timeout_minutes: int) -> None:
        self._model, self._copy = model, copy.eval()
        self._exchange = ExchangeAside(timeout_minutes)
        self._stream = torch.cuda.Stream() if has_gpu() else None
        # A thread begins on the first GPU, whichever is this process's.
        place = partial(torch.cuda.set_device, self._stream.device) if self._stream is not None else None
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="sampling", initializer=place)
        self._closed = False

    def begin(self, sample: Callable[[Sampler], T], version: int) -> Callable[[], T]:
        """Have ``sample`` called with the weights as they stand; the sampling before has to be done.

        Args:
            sample: a collective of the threads of all ranks.
            version: of the weights.

        Returns:
            a function that waits for what ``sample`` returns, or raises what it raised on the first rank that failed.
        """
        self._refresh()
        by = Sampler(self._copy, version, self, self._check, self._exchange)
        return self._worker.submit(self._run, partial(sample, by)).result

    def close(self) -> None:
        """Give up what is under way, and wait until it is."""
        self._closed = True
        self._worker.shutdown(wait=True)

    def is_requested(self) -> bool:
        """See ``Stop``; a request to end the run is none: its last checkpoint holds what is under way."""
        pulse.beat()
        return self._closed

    def agreed(self) -> bool:
        """See ``Stop``; of this rank alone, which tells the others by its failure."""
        return self._closed

    def _check(self) -> None:
        pulse.beat()
        if self._closed:
            raise Interrupted

    @torch.no_grad()
    def _refresh(self) -> None:
        if self._stream is not None:  # what the sampling before has left to do with the old weights
            torch.cuda.current_stream().wait_stream(self._stream)
        for mine, trained in zip(_weights(self._copy), _weights(self._model), strict=True):
            mine.copy_(trained)
            # Not frozen, though it takes no gradients: upstream's linears of frozen weights add up in another order.
            mine.requires_grad_(trained.requires_grad)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream())

    def _run(self, sample: Callable[[], T]) -> T:
        with ranges.beside(), contextlib.nullcontext() if self._stream is None else torch.cuda.stream(self._stream):
            return self._exchange.together(sample)


def _weights(model: VPModel) -> list[Tensor]:
    """Parameters and buffers, the routers' biases among them."""
    return [*model.parameters(), *model.buffers()]
