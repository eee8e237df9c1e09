"""One attention layer: its parameters, their precision, packing, decoding, checkpoints."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from attention_cases import packed_layout
from megatron.core import dist_checkpointing
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_vpmoe.model.attention.grape import initial_log_frequencies
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.attention.self_attention import (
    VPSelfAttention,
    VPSelfAttentionSubmodules,
    mixed_qkv_rows,
    split_mixed_qkv,
)
from megatron_vpmoe.model.transformer_config import VPTransformerConfig

pytestmark = pytest.mark.usefixtures("single_process")

HIDDEN, LOCAL, GLOBAL = 16, 2, 4
FP32_ISLANDS = {"sink", "grape_log_freq", "value_residual_scale"}


def config_of(**fields: object) -> VPTransformerConfig:
    defaults: dict[str, object] = {
        "num_layers": 4,
        "hidden_size": HIDDEN,
        "ffn_hidden_size": 8,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "kv_channels": 6,
        "qk_layernorm": True,
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-6,
        "add_qkv_bias": True,
        "softmax_type": "learnable",
        "window_size_tokens": 4,
        "window_attn_skip_freq": 4,
        "use_cpu_initialization": True,
        "init_method_std": 0.3,
    }
    return VPTransformerConfig(**{**defaults, **fields})  # type: ignore[arg-type]


def layer_of(number: int = LOCAL, *, seed: int = 0, **fields: object) -> VPSelfAttention:
    """A layer with every parameter moved off its initial value, so that none can be ignored unnoticed."""
    torch.manual_seed(seed)
    config = config_of(**fields)
    norm = WrappedTorchNorm if config.qk_layernorm else None
    layer = VPSelfAttention(
        config, VPSelfAttentionSubmodules(ColumnParallelLinear, RowParallelLinear, norm, norm), number
    )
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return layer


def run(layer: VPSelfAttention, hidden: Tensor, layout: SequenceLayout, first: Tensor) -> Tensor:
    (out, bias), _ = layer(hidden, layout, first if layer.layer_number > 1 else None)
    return out if bias is None else out + bias


def inputs_for(layout: SequenceLayout, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    batch, length = layout.document_id.shape
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(length, batch, HIDDEN, generator=generator)
    first = torch.randn(length, batch, 2, 6, generator=generator)
    return hidden.to(dtype), first.to(dtype)


def test_parameters_by_kind_of_layer() -> None:
    def names(number: int, **fields: object) -> set[str]:
        return {name for name, _ in layer_of(number, **fields).named_parameters()}

    shared = {"linear_proj.weight", "linear_proj.bias", "q_layernorm.weight", "k_layernorm.weight", "sink"}
    factors = {"linear_tpa_a.weight", "linear_tpa_a.bias", "linear_tpa_b.weight", "qkv_bias"}
    gqa = {"linear_qkv.weight", "linear_qkv.bias"}
    assert names(1) == shared | factors | {"grape_log_freq"}
    assert names(LOCAL) == shared | factors | {"grape_log_freq", "value_residual_scale"}
    assert names(GLOBAL) == shared | gqa | {"value_residual_scale"}
    assert names(LOCAL, tpa=False) == shared | gqa | {"grape_log_freq", "value_residual_scale"}
    plain = {
        "softmax_type": "vanilla",
        "value_residual": False,
        "qk_layernorm": False,
        "add_qkv_bias": False,
        "add_bias_linear": False,
        "tpa_factor_bias": False,
    }
    assert names(LOCAL, **plain) == {
        "linear_proj.weight",
        "linear_tpa_a.weight",
        "linear_tpa_b.weight",
        "grape_log_freq",
    }
    assert names(GLOBAL, **plain) == {"linear_proj.weight", "linear_qkv.weight"}


def test_every_parameter_takes_part() -> None:
    layout = packed_layout([9])
    hidden, first = inputs_for(layout)
    for number in (1, LOCAL, GLOBAL):
        layer = layer_of(number)
        run(layer, hidden, layout, first).square().sum().backward()
        idle = [name for name, p in layer.named_parameters() if p.grad is None or p.grad.norm() == 0]
        assert idle == []


@pytest.mark.parametrize("number", [1, LOCAL, GLOBAL])
def test_gradients_by_finite_differences(number: int) -> None:
    layout = packed_layout([4, 3])
    layer = layer_of(number).double()
    hidden, first = inputs_for(layout, dtype=torch.float64)
    names, parameters = zip(*layer.named_parameters(), strict=True)

    def output(hidden: Tensor, first: Tensor, *values: Tensor) -> Tensor:
        arguments = (hidden, layout, first if number > 1 else None)
        (out, bias), _ = torch.func.functional_call(layer, dict(zip(names, values, strict=True)), arguments)
        return out + bias

    inputs = (hidden.requires_grad_(), first.requires_grad_(), *parameters)
    assert torch.autograd.gradcheck(output, inputs, fast_mode=True)


@pytest.mark.parametrize("number", [1, LOCAL, GLOBAL])
def test_packed_documents_compute_what_they_compute_alone(number: int) -> None:
    layout = packed_layout([5, 8, 6])
    hidden, first = inputs_for(layout)
    layer = layer_of(number)
    packed = run(layer, hidden, layout, first)
    for begin, end in ((0, 5), (5, 13), (13, 19)):
        alone = run(layer, hidden[begin:end], packed_layout([end - begin]), first[begin:end])
        torch.testing.assert_close(packed[begin:end], alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("number", [1, LOCAL, GLOBAL])
def test_packed_documents_are_isolated_bit_for_bit(number: int) -> None:
    layout = packed_layout([5, 8, 6, -2])
    hidden, first = inputs_for(layout)
    layer = layer_of(number)
    before = run(layer, hidden, layout, first)
    disturbed_hidden, disturbed_first = hidden.clone(), first.clone()
    disturbed_hidden[5:13], disturbed_first[5:13] = 7.0, -50.0
    after = run(layer, disturbed_hidden, layout, disturbed_first)
    assert torch.equal(before[:5], after[:5]) and torch.equal(before[13:], after[13:])
    assert not torch.equal(before[5:13], after[5:13])


def test_backends_agree_in_the_layer() -> None:
    layout = packed_layout([9, 4], [13])
    hidden, first = inputs_for(layout)
    for number in (LOCAL, GLOBAL):
        auto, reference = (layer_of(number, attention_backend_name=name) for name in ("auto", "reference"))
        torch.testing.assert_close(run(auto, hidden, layout, first), run(reference, hidden, layout, first))
    assert auto.backend_name(hidden.device) == "sdpa" and reference.backend_name(hidden.device) == "reference"


def test_own_values_are_returned_before_mixing() -> None:
    layout = packed_layout([5])
    hidden, first = inputs_for(layout)
    layer = layer_of(LOCAL)
    _, own = layer(hidden, layout, first)
    torch.testing.assert_close(own, layer.project_qkv(hidden)[2], rtol=0, atol=0)
    with pytest.raises(ValueError, match="layer 2 mixes layer 1's values"):
        layer(hidden, layout, None)


def test_recomputation_keeps_the_gradient_into_the_first_values() -> None:
    """Layer 1's values reach a later layer through its checkpoint: the gradient must be the one without it."""
    layout = packed_layout([6, 5])
    hidden, _ = inputs_for(layout)
    first_layer, later = layer_of(1), layer_of(GLOBAL, seed=1)

    def gradients(recompute: bool) -> list[Tensor]:
        def call(layer: VPSelfAttention, *arguments: object):
            return checkpoint(layer, *arguments, use_reentrant=False) if recompute else layer(*arguments)

        (out, _), value = call(first_layer, hidden, layout, None)
        (out, _), _ = call(later, out, layout, value)
        parameters = [*first_layer.parameters(), *later.parameters()]
        grads = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
        return [g for g in grads if g is not None]

    for plain, recomputed in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(plain, recomputed)


def test_islands_stay_fp32_in_a_bf16_model() -> None:
    layer = layer_of(LOCAL, bf16=True)
    before = {name: getattr(layer, name).detach().clone() for name in FP32_ISLANDS}
    wrapped = Float16Module(layer.config, layer).module
    for name, parameter in wrapped.named_parameters():
        assert parameter.dtype == (torch.float32 if name in FP32_ISLANDS else torch.bfloat16), name
        assert getattr(parameter, "keep_fp32", False) == (name in FP32_ISLANDS)
    for name, value in before.items():
        assert torch.equal(getattr(wrapped, name), value), "a round trip through bf16 loses bits"


def test_islands_cast_with_gradients_and_widen() -> None:
    layer = layer_of(LOCAL)
    layer.sink.grad = torch.ones_like(layer.sink)
    layer.bfloat16()
    assert layer.sink.grad.dtype == torch.float32
    assert layer.double().sink.dtype == torch.float64
    assert layer.to("meta").sink.is_meta


def test_bf16_layer_stays_close_to_fp32() -> None:
    layout = packed_layout([20, 12])
    hidden, first = inputs_for(layout)
    for number in (1, LOCAL, GLOBAL):
        exact = run(layer_of(number), hidden, layout, first)
        rounded = run(layer_of(number).bfloat16(), hidden.bfloat16(), layout, first.bfloat16())
        assert rounded.dtype == torch.bfloat16
        assert (rounded - exact).norm() < 0.03 * exact.norm()


def test_matrix_rows_partition_every_fused_weight() -> None:
    for number in (LOCAL, GLOBAL):
        fused = [m.weight for name, m in layer_of(number).named_children() if "qkv" in name or "tpa" in name]
        for weight in fused:
            rows = torch.cat([torch.arange(weight.shape[0])[section] for section in weight.matrix_rows])
            assert rows.sort().values.tolist() == list(range(weight.shape[0]))
            assert len(weight.matrix_rows) == 3


def test_mixed_layout_is_queries_key_value_per_group() -> None:
    rows = [list(section) for section in mixed_qkv_rows(4, 2, 1)]
    assert rows == [[0, 1, 4, 5], [2, 6], [3, 7]]
    weight, x = torch.randn(16, 5), torch.randn(5)
    by_output = split_mixed_qkv(weight @ x, 4, 2)
    for section, projected in zip(mixed_qkv_rows(4, 2, 2), by_output, strict=True):
        torch.testing.assert_close((weight[section] @ x), projected.flatten())


def test_grape_m_layer_equals_a_rope_layer_at_initialisation() -> None:
    layout = packed_layout([30, 20])
    hidden, first = inputs_for(layout)
    rope, grape = layer_of(local_position_embedding="rope"), layer_of(seed=1)
    grape.load_state_dict(rope.state_dict(), strict=False)
    config = grape.config
    with torch.no_grad():
        grape.grape_log_freq.copy_(initial_log_frequencies(6, config.rotary_base, config.grapem_log_freq_scale))
    expected = run(rope, hidden, layout, first)
    torch.testing.assert_close(run(grape, hidden, layout, first), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_checkpoint_round_trip(tmp_path: Path) -> None:
    for number in (LOCAL, GLOBAL):
        saved, other = layer_of(number), layer_of(number, seed=9)
        path = tmp_path / str(number)
        path.mkdir()
        dist_checkpointing.save(saved.sharded_state_dict(prefix="attention."), str(path))
        state = dist_checkpointing.load(other.sharded_state_dict(prefix="attention."), str(path))
        other.load_state_dict({key.removeprefix("attention."): value for key, value in state.items()})
        for name, parameter in saved.named_parameters():
            assert torch.equal(parameter, other.get_parameter(name)), name
