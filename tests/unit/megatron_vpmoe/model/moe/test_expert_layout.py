"""Our stack of experts and Megatron-Core's SequentialMLP are two layouts of the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import get_default_pg_collection

from megatron_vpmoe.model.moe.experts import StackedExperts
from megatron_vpmoe.model.transformer_config import transformer_config
from ref.sequential_experts import sequential_from_stacked, stacked_from_sequential
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

PREFIX = "decoder.layers.1.mlp.experts."


def pair(*, biases: bool, activation: str = "squared_relu") -> tuple[StackedExperts, SequentialMLP]:
    config = transformer_config(tiny_config(add_bias_linear=biases, activation=activation))
    groups = get_default_pg_collection()
    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    theirs = SequentialMLP(8, config, linears, groups)
    modules: Any = theirs.local_experts
    for expert in modules:
        # The path of expert parallelism: behind its reduction over one rank upstream cannot add a bias in place.
        expert.linear_fc2.explicit_expert_comm = True
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return StackedExperts(8, config, groups), theirs


@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
@pytest.mark.parametrize("biases", [True, False])
def test_same_function_as_sequential_mlp(biases: bool, activation: str) -> None:
    """Upstream's state dict, converted, gives upstream's outputs and gradients."""
    ours, theirs = pair(biases=biases, activation=activation)
    ours.load_state_dict(stacked_from_sequential(theirs.state_dict()))
    counts, generator = torch.tensor([5, 0, 3, 1, 0, 7, 2, 6]), torch.Generator().manual_seed(1)
    x, grad = (torch.randn(24, 32, generator=generator) for _ in range(2))
    probs = torch.rand(24, generator=generator)
    found = []
    for experts in (ours, theirs):
        inputs, weights = x.clone().requires_grad_(), probs.clone().requires_grad_()
        out, _ = experts(inputs, counts, weights)
        out.backward(grad)
        found.append((out, inputs.grad, weights.grad))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-2)
    gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in theirs.named_parameters()}
    for name, want in stacked_from_sequential(gradients).items():
        torch.testing.assert_close(getattr(ours, name).grad, want, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("biases", [True, False])
def test_there_and_back(biases: bool) -> None:
    """Also through a module: upstream loads what we converted."""
    _, theirs = pair(biases=biases)
    state = {f"{PREFIX}{name}": value for name, value in theirs.state_dict().items() if value is not None}
    stacked = {f"{PREFIX}{name}": value for name, value in stacked_from_sequential(state, PREFIX).items()}
    back = sequential_from_stacked(stacked, PREFIX)
    tensors = {name: value for name, value in state.items() if isinstance(value, torch.Tensor) and value.numel()}
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], value) for name, value in tensors.items())
    _, other = pair(biases=biases)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    other.load_state_dict({name.removeprefix(PREFIX): value for name, value in back.items()}, strict=False)
    assert all(torch.equal(a, b) for a, b in zip(other.parameters(), theirs.parameters(), strict=True))


def test_gap_and_wrong_prefix_are_named() -> None:
    _, theirs = pair(biases=True)
    state = theirs.state_dict()
    del state["local_experts.3.linear_fc2.weight"]
    with pytest.raises(ValueError, match=r"fc2_weight are not 0 to 7"):
        stacked_from_sequential(state)
    with pytest.raises(ValueError, match=r"no experts under the prefix 'mlp\.'"):
        stacked_from_sequential(state, "mlp.")


@pytest.mark.parametrize("biases", [True, False])
def test_sharded_keys_and_shapes_are_upstreams(biases: bool) -> None:
    """In a distributed checkpoint both are the same global tensors; upstream's linears add empty extra states."""
    ours, theirs = pair(biases=biases)
    mine, upstream = (
        {e.key: e for e in side.sharded_state_dict(PREFIX).values() if not e.key.endswith("_extra_state")}
        for side in (ours, theirs)
    )
    assert mine.keys() == upstream.keys()
    for key, entry in mine.items():
        assert entry.global_shape == upstream[key].global_shape, key
        assert entry.dtype == upstream[key].dtype, key
