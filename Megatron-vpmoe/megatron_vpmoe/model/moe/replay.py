"""Which experts tokens went to, recorded in one pass and replayed in another: routing replay (arXiv 2510.11370).

A sampler computes a token alone, the trainer a row of them; sums that differ in the last bit send a token of nearly
tied scores to another expert, and its log-probability is then another one altogether. A replayed choice keeps the
experts; their weights are the router's scores of the pass that runs, with a gradient.

Upstream's ``RouterReplay`` keeps every router of the process in one list, so a reference model would replay as well,
and a queue for recomputed passes; here what is recorded or replayed belongs to the routers of one model, for as long as
a block lasts. A recomputed part repeats its own first pass by itself (``recompute.chosen_once``).

Shapes: b rows, s positions, L layers with experts, K experts a token, N tokens of a pass in the router's order [s, b].
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Literal

import torch
from torch import Tensor
from torch.nn import Module

from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.think.router import ExpertRouter

ROUTING = "routing"
"""Of each token (not of the one after, as other annotations), the K experts of layer 1 that has any, of layer 2, ..."""


def id_dtype(experts: int) -> Literal["uint8", "int16"]:
    """The smallest that holds the numbers of so many experts, from 0."""
    return "uint8" if experts <= 256 else "int16"


def _routers(model: Module) -> list[VPMoERouter]:
    """In the order of the layers."""
    return [module for module in model.modules() if isinstance(module, VPMoERouter)]


@contextlib.contextmanager
def recording(model: Module, wanted: bool = True) -> Iterator[Callable[[], Tensor] | None]:
    """Have the routers note where tokens go, for passes without a gradient that hold whole sequences.

    Yields:
        a function of no arguments: the choice of the pass before, [N, L K] of ``id_dtype``; of a mixture the weights of
        its experts, fp32 [N, E]. None where not wanted.
    """
    routers = _routers(model) if wanted else []
    mixing = [module for module in model.modules() if isinstance(module, ExpertRouter)] if wanted else []
    if mixing:
        (router,) = mixing
        router.recorded = recorded = []
        try:
            yield recorded.pop
        finally:
            router.recorded = None
        return
    lists: list[list[Tensor]] = [[] for _ in routers]
    for router, recorded in zip(routers, lists, strict=True):
        router.recorded = recorded

    def take() -> Tensor:
        chosen = torch.cat([recorded.pop() for recorded in lists], 1)
        return chosen.to(getattr(torch, id_dtype(len(routers[0].weight))))

    try:
        yield take if wanted else None
    finally:
        for router in routers:
            router.recorded = None


@contextlib.contextmanager
def replaying(model: Module, routing_BSN: Tensor | None, document_id_BS: Tensor) -> Iterator[None]:
    """Send tokens where they were recorded to go, in the forward pass of the block and in what is recomputed of it.

    Padding goes where the router sends it, and so does a document's last token: it was sampled and never computed. No
    label and no other token depends on it.

    Args:
        model: bare or wrapped.
        routing_BSN: [b, s, L K], as ``recording`` gave; None: nothing is replayed.
        document_id_BS: which document a position belongs to; negative in padding.
    """
    if routing_BSN is None:
        yield
        return
    routers = _routers(model)
    first = routers[0]
    device, tp = first.weight.device, first.tp_group
    known_BS = torch.zeros_like(document_id_BS, dtype=torch.bool)
    known_BS[:, :-1] = (document_id_BS[:, :-1] == document_id_BS[:, 1:]) & (document_id_BS[:, :-1] >= 0)
    parts = [x.to(device).transpose(0, 1) for x in (routing_BSN, known_BS.unsqueeze(-1))]
    if first.config.sequence_parallel:
        parts = [x.chunk(tp.size())[tp.rank()] for x in parts]
    routing, known = (x.flatten(0, 1) for x in parts)
    for router, chosen in zip(routers, routing.split(first.topk, -1), strict=True):
        router.replayed = chosen, known
    try:
        yield
    finally:
        for router in routers:
            router.replayed = None
