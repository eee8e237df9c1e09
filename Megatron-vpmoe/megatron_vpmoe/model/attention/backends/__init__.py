"""One function, softmax attention, behind which the implementations stand; here one of them is chosen, by name.

``reference``
    dense scores, fp32 softmax; every layer, every device. The others must equal it.
``banded``
    local layers on any device: blocks of W queries against 2W keys, time and memory O(S · W).
``sdpa``
    global layers on the CPU: torch's fused kernel over a dense mask that the layers share.
``flex``
    every layer on a GPU: FlexAttention, compiled, over the tiles that hold a visible pair. Prompts and scored texts,
    whose lengths are always new, go by ``reference`` instead.

Shapes: B batch, H query heads, G KV groups, S sequence, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.model.attention.backends.banded import banded_attention
from megatron_vpmoe.model.attention.backends.flex import flex_attention
from megatron_vpmoe.model.attention.backends.reference import reference_attention
from megatron_vpmoe.model.attention.backends.sdpa import sdpa_attention
from megatron_vpmoe.model.attention.masks import SequenceLayout

BACKENDS = ("reference", "banded", "sdpa", "flex")


def select_backend(requested: str, *, window: int | None, device: torch.device, alibi: bool = False) -> str:
    """The backend that runs a layer: ``requested``, or for "auto" the fastest that can.

    Args:
        requested: "auto" or a backend's name.
        window: the layer's; None: it is global.
        device: where it runs.
        alibi: the layer adds a bias on distance to its scores.

    Raises:
        DeviceError: the backend cannot run on this device. That it can run the layer is a rule of configurations.
    """
    on_cpu = device.type == "cpu"
    if requested == "auto":
        on_a_cpu = "sdpa" if window is None or alibi else "banded"
        return on_a_cpu if on_cpu else "flex"
    if requested == "sdpa" and not on_cpu:
        raise DeviceError(
            f"the attention backend 'sdpa' runs on the CPU only, not on {device}",
            source="attention_backend",
            remedy="attention_backend: auto",
        )
    if requested == "flex" and on_cpu:
        raise DeviceError(
            "the attention backend 'flex' cannot train on the CPU: FlexAttention has no backward pass there",
            source="attention_backend",
            remedy="attention_backend: auto takes banded and sdpa on a CPU",
        )
    return requested


def core_attention(
    q_BHSD: Tensor,
    k_BGSD: Tensor,
    v_BGSD: Tensor,
    *,
    layout: SequenceLayout,
    window: int | None,
    alibi_slopes_H: Tensor | None,
    sink_H: Tensor | None,
    softmax_scale: float,
    backend: str,
) -> Tensor:
    """Causal softmax attention within documents; returns [B, H, S, D] in the dtype of the queries.

    Scores are ``softmax_scale · q·k - slope_h · (i - j)``; the softmax is fp32 or wider. Head h reads KV group
    h // (H / G).

    Args:
        q_BHSD: queries.
        k_BGSD: keys.
        v_BGSD: values.
        layout: documents of the S rows.
        window: keys that a query sees, itself included; None: the whole document.
        alibi_slopes_H: fp32 [H], GRAPE-A's slopes; None: no bias on distance.
        sink_H: [H], the logit in each head's denominator; None: plain softmax.
        softmax_scale: factor on the dot products, usually 1/sqrt(D).
        backend: a name that `select_backend` returned.
    """
    queries, keys = q_BHSD.shape[2], k_BGSD.shape[2]
    if not queries == keys == layout.length:
        raise ValueError(f"{queries} queries and {keys} keys for a layout of {layout.length} rows")
    arguments = (q_BHSD, k_BGSD, v_BGSD, layout)
    if backend == "reference":
        return reference_attention(*arguments, window, alibi_slopes_H, sink_H, softmax_scale)
    if backend == "flex":
        return flex_attention(*arguments, window, alibi_slopes_H, sink_H, softmax_scale)
    if backend == "sdpa":
        return sdpa_attention(*arguments, window, alibi_slopes_H, sink_H, softmax_scale)
    if backend == "banded" and window is not None and alibi_slopes_H is None:
        return banded_attention(*arguments, window, sink_H, softmax_scale)
    raise ValueError(f"{backend!r} cannot run window={window}, alibi={alibi_slopes_H is not None}")
