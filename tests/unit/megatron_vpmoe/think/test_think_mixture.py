"""The whole of the parts: causal, packed as apart, decoded as computed, differentiable; at first its experts alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_vpmoe.runtime.counter import draw_key, random_bits
from megatron_vpmoe.think.diffuser import Diffuser
from megatron_vpmoe.think.memory import Memory
from megatron_vpmoe.think.mixture import ExpertMixture
from megatron_vpmoe.think.scale import Scale
from megatron_vpmoe.think.stack_expert import StackExpert
from tests.think_parts import (
    Inputs,
    check_causality,
    check_decoding,
    check_gradients,
    check_packing,
    chunks_of,
    drawn,
    packed,
    part_config,
    run,
)

pytestmark = pytest.mark.usefixtures("single_process")

WIDTH = 32
STATE_SPACE = {"layer_type": "state_space", "ssm_inner_size": 24, "ssm_state_size": 4, "ssm_step_rank": 3}


def mixture(dtype: torch.dtype = torch.float64) -> ExpertMixture:
    torch.manual_seed(0)
    config = part_config(dtype, num_layers=2)
    experts = {
        "transformer": StackExpert(config),
        "state_space": StackExpert(part_config(dtype, num_layers=2, **STATE_SPACE)),
        "diffuser": Diffuser(config, layers=2, levels=20, steps=2),
    }
    return ExpertMixture(config, experts, latent_width=12, rope_width=4, memory=True)


def inputs_of(length: int) -> Inputs:
    x = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return {"x_BSH": x, "noise_key_BS": random_bits(torch.tensor(draw_key(1)), torch.arange(length)).unsqueeze(0)}


SCALE = Scale(
    0.1 * torch.randn(WIDTH, generator=torch.Generator().manual_seed(8), dtype=torch.float64),
    0.5 + torch.rand(WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64),
)


class Both(torch.nn.Module):
    """Of a mixture: hidden states and weights in one tensor, for checks that compare one."""

    def __init__(self, part: ExpertMixture) -> None:
        super().__init__()
        self.part = part

    def forward(self, *given: object, **keywords: Tensor) -> Tensor:
        return torch.cat(self.part(*given, scale=SCALE, **keywords), -1)

    def entries(self) -> object:
        return self.part.entries()

    def step(self, *given: object, **keywords: Tensor) -> Tensor:
        return torch.cat(self.part.step(*given, scale=SCALE, **keywords), -1)  # type: ignore[arg-type]


def test_a_packed_row_is_its_documents_alone() -> None:
    check_packing(Both(drawn(mixture())), inputs_of(5 + 7 + 4 + 3), [5, 7, 4])


def test_a_token_changes_nothing_before_it() -> None:
    check_causality(Both(drawn(mixture())), inputs_of(6), 6)


def test_decoding_is_the_whole_pass() -> None:
    check_decoding(Both(drawn(mixture())), inputs_of(9 + 3 + 6), [9, 3, 6], 3, lambda name: name.replace("_BS", "_B"))


@pytest.mark.slow
def test_gradients() -> None:
    part, inputs = drawn(mixture()), inputs_of(4)
    weight = torch.randn(1, 4, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    memory = Memory(
        torch.ones(1, 1, 1, WIDTH, dtype=torch.float64),
        torch.ones(1, 1, dtype=torch.int64),
        torch.zeros(1, 4, dtype=torch.int64),
    )

    def loss(given: Inputs) -> Tensor:
        keywords = {"scale": SCALE, "noise_key_BS": given["noise_key_BS"], "memory": memory}
        fused, weights = part(given["x_BSH"], packed(4), **keywords)
        return (fused * weight).sum() + weights.square().sum()

    check_gradients(part, loss, inputs)


def test_at_first_it_is_its_experts_in_equal_or_given_shares() -> None:
    """To the bit: stacks read embeddings as they are, the diffuser standardised ones."""
    part, inputs, layout = mixture().double(), inputs_of(6), packed(6)
    x, keys = inputs["x_BSH"], inputs["noise_key_BS"]
    fused, weights = part(x, layout, scale=SCALE, noise_key_BS=keys)
    alone = [
        part.experts["transformer"](x, layout),
        part.experts["state_space"](x, layout),
        part.experts["diffuser"]((x - SCALE.mean_H) / SCALE.deviation_H, layout, noise_key_BS=keys),
    ]
    shares = [share * one for share, one in zip(weights.unsqueeze(-2).unbind(-1), alone, strict=True)]
    assert torch.equal(fused, torch.stack(shares).sum(0))


def test_an_empty_store_is_no_store_bit_for_bit() -> None:
    part, inputs, layout = drawn(mixture()), inputs_of(6), packed(6)
    without = run(Both(part), inputs, layout)
    nothing = Memory(torch.zeros(1, 2, 3, WIDTH), torch.zeros(1, 2, dtype=torch.int64), chunks_of(layout, 4))
    with_it = Both(part)(inputs["x_BSH"], layout, noise_key_BS=inputs["noise_key_BS"], memory=nothing)
    assert torch.equal(with_it, without)


def test_in_bf16_it_is_near_and_weights_are_fp32() -> None:
    wide = drawn(mixture(torch.float32), torch.float32, scale=0.1)
    narrow = mixture(torch.bfloat16).bfloat16()
    narrow.load_state_dict(wide.state_dict())
    inputs, layout = inputs_of(8), packed(8)
    given = {"scale": SCALE, "noise_key_BS": inputs["noise_key_BS"]}
    expected, weights = wide(inputs["x_BSH"].float(), layout, **given)
    found, narrow_weights = narrow(inputs["x_BSH"].bfloat16(), layout, **given)
    assert found.dtype == torch.bfloat16 and narrow_weights.dtype == torch.float32
    torch.testing.assert_close(narrow_weights, weights, rtol=0.05, atol=0.02)
    assert (found.float() - expected).norm() < 0.05 * expected.norm()


def test_layers_that_are_not_nano_thinks_are_refused() -> None:
    with pytest.raises(ValueError, match="layer 1 is not one"):
        StackExpert(part_config(num_layers=1, softmax_type="learnable"))
