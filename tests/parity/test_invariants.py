"""What must hold of the whole model and of its positions, whatever the implementation."""

from __future__ import annotations

import pytest
import torch
from student_cases import DENSE, STUDENTS, lively_model, packed, random_tokens
from torch import Tensor

from megatron_vpmoe.model.attention.backends import core_attention
from megatron_vpmoe.model.attention.grape import alibi_slopes, initial_log_frequencies, rotate, rotation_angles
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel

pytestmark = pytest.mark.usefixtures("single_process")

CPU = torch.device("cpu")
LAYERS, WINDOW, LENGTH = 4, 5, 40


def logits(model: VPModel, tokens: Tensor, layout: SequenceLayout) -> Tensor:
    with torch.no_grad():
        return model(tokens, layout).logits()


def changed_rows(model: VPModel, position: int) -> list[int]:
    """Positions whose logits move, in any bit, when one token is replaced by another."""
    tokens, layout = random_tokens(LENGTH), packed(LENGTH)
    before = logits(model, tokens, layout)
    tokens[0, position] = (tokens[0, position] + 7) % 64
    after = logits(model, tokens, packed(LENGTH))
    return [i for i in range(LENGTH) if not torch.equal(before[0, i], after[0, i])]


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("position", [0, 3, 30])
def test_a_token_reaches_layers_times_the_window_and_no_further(position: int, backend: str) -> None:
    """Layers of window W hand a token on by W - 1 positions each: 4 x 4 here. All are local: no 99th layer."""
    model = lively_model(
        torch.float64, **DENSE, window_size=WINDOW, window_attn_skip_freq=99, attention_backend=backend
    ).eval()
    reach = LAYERS * (WINDOW - 1)
    assert changed_rows(model, position) == list(range(position, min(LENGTH, position + reach + 1)))


@pytest.mark.parametrize("name", ["vpDense full", "vpDense shape only", "Qwen3"])
def test_with_a_global_layer_a_token_reaches_the_end_and_never_back(name: str) -> None:
    model = lively_model(torch.float64, **STUDENTS[name]).eval()
    assert changed_rows(model, 17) == list(range(17, LENGTH))


@pytest.mark.parametrize(("name", "tolerance"), [("vpDense full", 1e-11), ("vpDense shape only", 1e-4)])
def test_only_distances_count(name: str, tolerance: float) -> None:
    """All positions of a document shifted by one number. RoPE's angles are fp32 even in an fp64 model."""
    model = lively_model(torch.float64, **STUDENTS[name]).eval()
    tokens, layout = random_tokens(LENGTH), packed(15, 20, padding=5)
    before = logits(model, tokens, layout)
    shifted = SequenceLayout(layout.document_id, layout.position + 1000)
    torch.testing.assert_close(logits(model, tokens, shifted), before, rtol=tolerance, atol=tolerance)
    stretched = SequenceLayout(layout.document_id, layout.position * 2)
    assert (logits(model, tokens, stretched) - before).abs().max() > 0.01, "positions do not count at all"


def test_scores_are_shift_invariant_to_1e_12() -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (
        torch.nn.functional.normalize(torch.randn(1, 1, 8, 128, generator=generator, dtype=torch.float64), dim=-1)
        for _ in range(2)
    )
    frequency = torch.exp(initial_log_frequencies(128, 1e6, 16.0).double() / 16)
    frequency = frequency * (1 + 0.2 * torch.randn(64, generator=generator, dtype=torch.float64))

    def score(i: int, j: int) -> Tensor:
        angles = (rotation_angles(torch.tensor([[t]]), frequency) for t in (i, j))
        turned = [rotate(x, angle) for x, angle in zip((query, key), angles, strict=True)]
        return (turned[0] * turned[1]).sum(-1)

    for i, j in ((0, 0), (5, 3), (127, 0)):
        for shift in (1, 64, 1000, 2047 - i):
            torch.testing.assert_close(score(i + shift, j + shift), score(i, j), rtol=0, atol=1e-12)
    assert (score(5, 3) - score(3, 5)).abs().max() > 1e-3, "the direction counts"


@pytest.mark.parametrize("heads", [1, 2, 3, 6, 8, 12, 20])
@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_grape_a_equals_blooms_alibi(heads: int, backend: str) -> None:
    """transformers' BLOOM adds m_h · j to the scores, which without a sink is the same function; with one it is not."""
    from transformers.models.bloom import modeling_bloom as bloom

    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 33, 8, generator=generator) for _ in range(3))
    alibi = bloom.build_alibi_tensor(torch.ones(1, 33), heads, torch.float32).view(1, heads, 1, 33)
    score = q @ k.mT * 0.3 + alibi
    score = score.masked_fill(torch.ones(33, 33, dtype=torch.bool).triu(1), -torch.inf)

    def ours(sink: Tensor | None) -> Tensor:
        return core_attention(
            q,
            k,
            v,
            layout=packed(33),
            window=None,
            alibi_slopes_H=alibi_slopes(heads, CPU),
            sink_H=sink,
            softmax_scale=0.3,
            backend=backend,
        )

    torch.testing.assert_close(ours(None), torch.softmax(score, -1) @ v, rtol=1e-4, atol=1e-5)
    sink = torch.zeros(heads)
    column = sink.view(1, heads, 1, 1).expand(1, heads, 33, 1)
    key_only = torch.softmax(torch.cat([score, column], -1), -1)[..., :-1] @ v
    assert (ours(sink) - key_only).abs().max() > 1e-3


def test_tensor_product_with_constant_factors_is_a_grouped_query_layer() -> None:
    """W_A = 0 and bias R·I with R = G and R_q = H: equal logits, and equal gradients of all that both have."""
    grouped = lively_model(torch.float64, **DENSE, tpa=False)
    product = lively_model(torch.float64, **DENSE, tpa_rank=2, tpa_q_rank=4)
    heads, groups, dim = 4, 2, 8
    source = dict(grouped.named_parameters())
    order = torch.arange(64).view(8, dim)[[0, 1, 4, 5, 2, 6, 3, 7]].flatten()  # from the mixed layout
    identity = torch.cat([(r * torch.eye(r, dtype=torch.float64)).flatten() for r in (heads, groups, groups)])
    with torch.no_grad():
        for name, parameter in product.named_parameters():
            layer = name.rsplit(".", 2)[0]
            if name.endswith("linear_tpa_a.weight"):
                parameter.zero_()
            elif name.endswith("linear_tpa_a.bias"):
                parameter.copy_(identity)
            elif name.endswith("linear_tpa_b.weight"):
                parameter.copy_(source[f"{layer}.linear_qkv.weight"][order])
            elif name.endswith("qkv_bias"):
                parameter.copy_(source[name.replace("qkv_bias", "linear_qkv.bias")])
            else:
                parameter.copy_(source[name])
    tokens, layout = random_tokens(LENGTH), packed(25, 15)
    outputs = [model(tokens, layout).logits() for model in (product, grouped)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    cotangent = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for output in outputs:
        output.backward(cotangent)
    for name, parameter in product.named_parameters():
        layer = name.rsplit(".", 2)[0]
        if name.endswith("linear_tpa_b.weight"):
            expected = source[f"{layer}.linear_qkv.weight"].grad[order]
        elif name in source:
            expected = source[name].grad
        else:
            continue
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-10, atol=1e-10, msg=name)


@pytest.mark.parametrize("experts", [None, 8])
def test_a_value_residual_of_one_is_the_model_without_it(experts: int | None) -> None:
    """Bit for bit, in fp32: at its initial value the mix is not there."""
    changes = {"num_experts": experts}
    plain = lively_model(**changes, value_residual=False).eval()
    mixing = lively_model(**changes).eval()
    with torch.no_grad():
        for name, parameter in mixing.named_parameters():
            if name.endswith("value_residual_scale"):
                parameter.fill_(1.0)
            else:
                parameter.copy_(plain.get_parameter(name))
        for name, buffer in mixing.named_buffers():
            buffer.copy_(plain.get_buffer(name))
    tokens, layout = random_tokens(LENGTH), packed(25, 15)
    assert torch.equal(logits(mixing, tokens, layout), logits(plain, tokens, layout))
    with torch.no_grad():
        mixing.decoder.layers[2].self_attention.value_residual_scale.fill_(0.5)
    assert not torch.equal(logits(mixing, tokens, layout), logits(plain, tokens, layout))


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_sinks_of_minus_infinity_are_the_vanilla_model(backend: str) -> None:
    vanilla = lively_model(torch.float64, **DENSE, softmax_type="vanilla", attention_backend=backend)
    with_sinks = lively_model(torch.float64, **DENSE, attention_backend=backend)
    with torch.no_grad():
        for name, parameter in with_sinks.named_parameters():
            if name.endswith("sink"):
                parameter.fill_(-torch.inf)
            else:
                parameter.copy_(vanilla.get_parameter(name))
    tokens, layout = random_tokens(LENGTH), packed(25, 10, padding=5)
    outputs = [model(tokens, layout).logits() for model in (with_sinks, vanilla)]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12)
    for output in outputs:
        output.square().sum().backward()
    for name, parameter in with_sinks.named_parameters():
        if name.endswith("sink"):
            assert torch.equal(parameter.grad, torch.zeros_like(parameter)), name
        else:
            expected = vanilla.get_parameter(name).grad
            torch.testing.assert_close(parameter.grad, expected, rtol=1e-9, atol=1e-9, msg=name)
