"""The diffuser hangs on what is before, on nothing beside, and decodes as it computes; its loss is the estimate's."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from megatron_vpmoe.model.attention import grape
from megatron_vpmoe.model.recompute import Recomputation
from megatron_vpmoe.runtime.counter import draw_key, normal, random_bits
from megatron_vpmoe.think.diffuser import Diffuser
from ref import diffuser as reference
from tests.think_parts import (
    Inputs,
    apart,
    check_causality,
    check_decoding,
    check_gradients,
    check_packing,
    drawn,
    packed,
    part_config,
    run,
)

WIDTH = 32


def diffuser(dtype: torch.dtype = torch.float64, layers: int = 2, steps: int = 3, **changes: object) -> Diffuser:
    torch.manual_seed(0)
    return Diffuser(part_config(dtype, **changes), layers=layers, levels=20, steps=steps)


def inputs_of(length: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Inputs:
    x = torch.randn(1, length, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return {"x_BSH": x, "noise_key_BS": random_bits(torch.tensor(draw_key(seed)), torch.arange(length)).unsqueeze(0)}


def test_by_the_definition() -> None:
    part, inputs = drawn(diffuser()), inputs_of(5)
    by_hand = reference.Denoiser(
        dict(part.named_parameters()),
        layers=2,
        heads=4,
        levels=20,
        frequency=grape.rope_frequencies(8, part.config.rotary_base, torch.device("cpu")).double(),
        eps=part.config.layernorm_epsilon,
    )
    noise = normal(inputs["noise_key_BS"], WIDTH)[0].double()
    expected = by_hand.denoised(list(inputs["x_BSH"][0]), list(noise), [20, 14, 7, 0])
    assert part.schedule.path == (20, 14, 7, 0)
    found = run(part, inputs, packed(5))[0]
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=1e-5)  # angles and waves are fp32


def test_a_packed_row_is_its_documents_alone() -> None:
    check_packing(drawn(diffuser()), inputs_of(5 + 7 + 4 + 3), [5, 7, 4])


def test_a_token_changes_nothing_before_it() -> None:
    check_causality(drawn(diffuser()), inputs_of(6), 6)


def test_decoding_is_the_whole_pass() -> None:
    check_decoding(drawn(diffuser()), inputs_of(9 + 3 + 6), [9, 3, 6], 3, lambda name: name.replace("_BS", "_B"))


def test_decoding_in_fp32() -> None:
    part = drawn(diffuser(torch.float32), torch.float32, scale=0.1)
    inputs = inputs_of(9 + 3 + 6, dtype=torch.float32)
    check_decoding(part, inputs, [9, 3, 6], 3, lambda name: name.replace("_BS", "_B"), tolerance=1e-4)


def test_the_estimate_hangs_on_its_own_key_alone() -> None:
    """Another noise at one position moves that position's estimate and no other."""
    part, inputs = drawn(diffuser()), inputs_of(6)
    whole = run(part, inputs, packed(6))
    other = {**inputs, "noise_key_BS": inputs["noise_key_BS"].clone()}
    other["noise_key_BS"][0, 2] += 1
    moved = (run(part, other, packed(6)) != whole).any(-1)[0]
    assert moved.tolist() == [False, False, True, False, False, False]


def test_gradients_of_the_estimate_and_of_the_loss() -> None:
    part, inputs = drawn(diffuser(layers=2, steps=2)), inputs_of(4 + 3)
    generator = torch.Generator().manual_seed(1)
    weight, target = (torch.randn(1, 7, WIDTH, generator=generator, dtype=torch.float64) for _ in range(2))
    check_gradients(part, lambda given: (run(part, given, packed(4, 3)) * weight).sum(), inputs)

    def loss(given: Inputs) -> Tensor:
        return part.loss(given["x_BSH"], target, packed(4, 3), given["noise_key_BS"]).sum()

    check_gradients(part, loss, inputs)


def test_recomputing_changes_no_gradient() -> None:
    inputs, found = inputs_of(5), []
    for granularity in (None, "full"):
        part = drawn(diffuser()).train()
        part.config = dataclasses.replace(part.config, recomputation=Recomputation(granularity))
        run(part, inputs, packed(5)).square().sum().backward()
        found.append([parameter.grad for parameter in part.parameters()])
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)


def test_at_first_the_estimate_is_the_mean_of_what_is_standardised() -> None:
    part = diffuser(steps=1)
    inputs = inputs_of(600)
    assert run(part, inputs, packed(600)).abs().max() == 0
    target = normal(inputs["noise_key_BS"] + 1, WIDTH)
    loss = part.loss(inputs["x_BSH"], target, packed(600), inputs["noise_key_BS"])
    assert loss.shape == (1, 600)
    assert loss.mean().item() == pytest.approx(1, abs=0.03)


def test_every_level_is_trained_and_that_of_ddims_start_among_them() -> None:
    part, seen = diffuser(layers=1), []
    part.schedule.noised = lambda clean, noise, level: (seen.append(level), clean)[1]  # type: ignore[method-assign, assignment]
    inputs = inputs_of(1000)
    part.loss(inputs["x_BSH"][:, :1].expand(-1, 1000, -1), inputs["x_BSH"], packed(*[1] * 1000), inputs["noise_key_BS"])
    counts = seen[0].flatten().bincount(minlength=21)
    assert counts[0] == 0 and counts[part.schedule.path[0]] > 0
    assert counts[1:].tolist() == pytest.approx([50] * 20, rel=0.5)


@pytest.mark.slow
def test_it_learns_what_follows() -> None:
    """Five tokens in a fixed order: after training the estimate is the embedding of the next one, of no other."""
    part = diffuser(torch.float32, layers=1, steps=5)
    table = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(0))
    table = (table - table.mean(0)) / table.std(0, correction=0)
    tokens = torch.arange(40) % 5
    x, target, layout = table[tokens].unsqueeze(0), table[(tokens + 1) % 5].unsqueeze(0), packed(20, 20)
    optimizer = torch.optim.AdamW(part.parameters(), lr=2e-3)
    for step in range(150):
        keys = random_bits(torch.tensor(draw_key(1, step)), torch.arange(40)).unsqueeze(0)
        loss = part.loss(x, target, layout, keys).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    keys = random_bits(torch.tensor(draw_key(2)), torch.arange(40)).unsqueeze(0)
    with torch.no_grad():
        found = part(x, layout, noise_key_BS=keys)
    assert (found - target).square().mean().item() < 0.1
    nearest = torch.cdist(found[0], table).argmin(-1)
    assert torch.equal(nearest, (tokens + 1) % 5) and apart(found, [20, 20])
