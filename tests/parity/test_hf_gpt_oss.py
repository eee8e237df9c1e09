"""Sinks and sliding window against transformers' GPT-OSS: its whole attention module with the weights of ours.

GPT-OSS is what our design has in common with it: grouped queries with biases, RoPE in halves, a learnt sink a head, a
window in some layers. Its QK-norm-less attention is our layer with those switches.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from student_cases import DENSE, lively_model, packed
from torch import Tensor
from transformers import masking_utils as masking
from transformers.models.gpt_oss import modeling_gpt_oss as modeling

from megatron_vpmoe.model.attention.backends import core_attention
from megatron_vpmoe.model.attention.masks import SequenceLayout

HEADS, GROUPS, DIM, HIDDEN, LENGTH, WINDOW, BASE = 4, 2, 8, 32, 29, 8, 150_000.0


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def gpt_oss_config(window: int) -> object:
    return transformers.GptOssConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        head_dim=DIM,
        sliding_window=window,
        layer_types=["sliding_attention", "full_attention"],
        rope_parameters={"rope_type": "default", "rope_theta": BASE},
        attn_implementation="eager",
    )


def mask_of(config: object, length: int, *, sliding: bool) -> Tensor:
    make = masking.create_sliding_window_causal_mask if sliding else masking.create_causal_mask
    return make(
        config=config,
        inputs_embeds=torch.zeros(1, length, 1, dtype=torch.float64),
        attention_mask=None,
        past_key_values=None,
        position_ids=torch.arange(length)[None],
    )


@pytest.mark.parametrize("backend", ["reference", "banded"])
def test_core_attention(backend: str) -> None:
    """Scores, window, sink and values alone, in fp64, with the gradients of all four."""
    q, sinks = draw(1, HEADS, LENGTH, DIM), draw(HEADS, seed=3)
    k, v = draw(1, GROUPS, LENGTH, DIM, seed=1), draw(1, GROUPS, LENGTH, DIM, seed=2)
    module = SimpleNamespace(num_key_value_groups=HEADS // GROUPS, sinks=sinks, training=False)
    mask = mask_of(gpt_oss_config(4), LENGTH, sliding=True)
    theirs, _ = modeling.eager_attention_forward(module, q, k, v, mask, scaling=DIM**-0.5)
    ours = core_attention(
        q,
        k,
        v,
        layout=SequenceLayout(torch.zeros(1, LENGTH, dtype=torch.int32), torch.arange(LENGTH)[None]),
        window=4,
        alibi_slopes_H=None,
        sink_H=sinks,
        softmax_scale=DIM**-0.5,
        backend=backend,
    ).transpose(1, 2)
    torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)
    cotangent = draw(*ours.shape, seed=9).detach()
    gradients = (torch.autograd.grad(out, (q, k, v, sinks), cotangent) for out in (ours, theirs))
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-11, atol=1e-11)


@pytest.mark.usefixtures("single_process")
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("sliding", [True, False])
def test_whole_attention_layer(sliding: bool, backend: str) -> None:
    """Hidden states in, projected output out; gradients of the input, every weight and the sinks."""
    model = lively_model(
        **DENSE,
        tpa=False,
        qk_layernorm=False,
        value_residual=False,
        local_position_embedding="rope",
        global_position_embedding="rope",
        rotary_base=BASE,
        window_size=WINDOW,
        attention_backend=backend,
    )
    ours = model.decoder.layers[1 if sliding else 3].self_attention
    assert ours.window == (WINDOW if sliding else None)
    theirs = modeling.GptOssAttention(gpt_oss_config(WINDOW), 0 if sliding else 1).float().eval()
    rows = {"q_proj": [0, 1, 4, 5], "k_proj": [2, 6], "v_proj": [3, 7]}  # of Megatron's mixed layout, in heads

    def split(mixed: Tensor, heads: list[int]) -> Tensor:
        return torch.cat([mixed[head * DIM : (head + 1) * DIM] for head in heads])

    def pairs(mine: object, reference: object) -> list[tuple[str, Tensor, Tensor]]:
        """Name, our tensor in their layout, theirs; ``mine`` and ``reference`` read a tensor from a parameter."""
        out = [("sinks", mine(ours.sink), reference(theirs.sinks))]
        for kind in ("weight", "bias"):
            out.append(
                (f"o_proj.{kind}", mine(getattr(ours.linear_proj, kind)), reference(getattr(theirs.o_proj, kind)))
            )
            mixed = mine(getattr(ours.linear_qkv, kind))
            for name, heads in rows.items():
                parameter = getattr(getattr(theirs, name), kind)
                out.append((f"{name}.{kind}", split(mixed, heads), reference(parameter)))
        return out

    for _, mine, target in pairs(lambda p: p.detach(), lambda p: p.data):
        target.copy_(mine)
    hidden = torch.randn(1, LENGTH, HIDDEN, generator=torch.Generator().manual_seed(0))
    inputs = [hidden.clone().requires_grad_() for _ in range(2)]
    (projected, bias), _ = ours(inputs[0].transpose(0, 1), packed(LENGTH))
    mine = (projected if bias is None else projected + bias).transpose(0, 1)
    rotary = modeling.GptOssRotaryEmbedding(gpt_oss_config(WINDOW))
    mask = mask_of(gpt_oss_config(WINDOW), LENGTH, sliding=sliding).float()
    reference, _ = theirs(inputs[1], rotary(inputs[1], torch.arange(LENGTH)[None]), mask)
    assert reference.std() > 0.1
    torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)

    cotangent = torch.randn(mine.shape, generator=torch.Generator().manual_seed(1))
    mine.backward(cotangent)
    reference.backward(cotangent)
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    for name, gradient, expected in pairs(lambda p: p.grad, lambda p: p.grad):
        assert expected.abs().max() > 1e-3, name
        torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-4, msg=name)
