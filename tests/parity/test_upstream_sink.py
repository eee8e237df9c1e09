"""Sink and window against Megatron-Core's own attention with ``softmax_type="learnable"``, unfused."""

from __future__ import annotations

import pytest
import torch
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from student_cases import packed
from torch import Tensor

from megatron_vpmoe.model.attention.backends import core_attention

pytestmark = pytest.mark.usefixtures("single_process")

HEADS, GROUPS, DIM, LENGTH, BATCH = 8, 2, 16, 37, 2


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_()


def upstream(window: int | None) -> DotProductAttention:
    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        num_query_groups=GROUPS,
        kv_channels=DIM,
        softmax_type="learnable",
        # Upstream counts the tokens before the query, we count the query too.
        window_size=None if window is None else (window - 1, 0),
        attention_dropout=0.0,
        masked_softmax_fusion=False,
        perform_initialization=False,
        use_cpu_initialization=True,
    )
    return DotProductAttention(config, 1, AttnMaskType.causal, "self")


@pytest.mark.parametrize(
    ("window", "backend"), [(8, "reference"), (8, "banded"), (1, "banded"), (None, "reference"), (None, "sdpa")]
)
@pytest.mark.parametrize("sink_is", ["drawn", "minus infinity"])
def test_equals_upstream(window: int | None, backend: str, sink_is: str) -> None:
    q = draw(LENGTH, BATCH, HEADS, DIM, seed=0)
    k, v = draw(LENGTH, BATCH, GROUPS, DIM, seed=1), draw(LENGTH, BATCH, GROUPS, DIM, seed=2)
    theirs = upstream(window)
    sink = torch.full((HEADS,), -torch.inf) if sink_is == "minus infinity" else draw(HEADS, seed=3).detach()
    theirs.softmax_offset.data.copy_(sink)
    sink.requires_grad_()
    expected = theirs(q, k, v, attention_mask=None)
    row = packed(LENGTH)
    ours = core_attention(
        *(x.permute(1, 2, 0, 3) for x in (q, k, v)),
        layout=type(row)(row.document_id.expand(BATCH, -1), row.position.expand(BATCH, -1)),
        window=window,
        alibi_slopes_H=None,
        sink_H=sink,
        softmax_scale=DIM**-0.5,
        backend=backend,
    )
    ours = ours.permute(2, 0, 1, 3).flatten(2)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)

    cotangent = draw(*ours.shape, seed=4).detach()
    mine = torch.autograd.grad(ours, (q, k, v, sink), cotangent)
    reference = torch.autograd.grad(expected, (q, k, v, theirs.softmax_offset), cotangent)
    for gradient, other in zip(mine, reference, strict=True):
        torch.testing.assert_close(gradient, other, rtol=1e-4, atol=1e-5)
