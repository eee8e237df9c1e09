"""Latent attention against its definition, and from what it keeps; a memory of nothing changes nothing, bit for bit."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_vpmoe.model.attention import grape
from megatron_vpmoe.think.latent_attention import LatentAttention
from megatron_vpmoe.think.memory import Memory
from ref import latent_attention as reference
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

WIDTH, ROPE, LATENT, CHUNK = 32, 4, 12, 4


def attention(dtype: torch.dtype = torch.float64) -> LatentAttention:
    torch.manual_seed(0)
    part = LatentAttention(part_config(dtype), latent_width=LATENT, rope_width=ROPE)
    part.read_memory()
    return part


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def inputs_of(length: int, dtype: torch.dtype = torch.float64) -> Inputs:
    return {"x_BSH": draw(1, length, WIDTH, dtype=dtype)}


def memory_of(lengths: list[int], counts: list[int], entries: int = 3) -> Memory:
    """Of a packed row; zeros beyond the counts."""
    chunk = chunks_of(packed(*lengths), CHUNK)
    count = torch.tensor([counts])
    held = draw(1, len(counts), entries, WIDTH, seed=7)
    held[torch.arange(entries) >= count.unsqueeze(-1)] = 0
    return Memory(held, count, chunk)


def test_what_is_kept_of_a_token_at_the_design_size() -> None:
    config = part_config(hidden_size=384, num_attention_heads=6, num_query_groups=6, kv_channels=64)
    part = LatentAttention(config, latent_width=96, rope_width=32)
    assert [entry.shape for entry in part.entries().values()] == [(128,)]


@pytest.mark.parametrize("counts", [None, [0, 3, 2], [1, 0, 3]])
def test_by_the_definition(counts: list[int] | None) -> None:
    part, x = drawn(attention()), inputs_of(9)["x_BSH"]
    memory = None if counts is None else memory_of([9], counts)
    found = part(x, packed(9), memory=memory)
    readable: list[list[Tensor]] = [[] for _ in range(9)]
    if memory is not None and counts is not None:
        readable = [list(memory.entries_BGKH[0, t // CHUNK, : counts[t // CHUNK]]) for t in range(9)]
    expected = reference.latent_attention(
        list(x[0]),
        dict(part.named_parameters()),
        readable,
        heads=4,
        head_dim=8,
        frequency=grape.rope_frequencies(ROPE, part.config.rotary_base, torch.device("cpu")).double(),
        eps=part.config.layernorm_epsilon,
    )
    torch.testing.assert_close(found[0], torch.stack(expected), rtol=1e-5, atol=1e-6)  # its angles are fp32


def test_a_packed_row_is_its_documents_alone() -> None:
    check_packing(drawn(attention()), inputs_of(5 + 7 + 4 + 3), [5, 7, 4])


def test_a_packed_row_with_memory_is_its_documents_alone() -> None:
    part, x, lengths = drawn(attention()), inputs_of(12)["x_BSH"], [5, 7]
    counts = [2, 1, 0, 3]  # of two chunks each
    memory = memory_of(lengths, counts)
    whole = part(x, packed(*lengths), memory=memory)
    for begin, length, chunks in ((0, 5, slice(0, 2)), (5, 7, slice(2, 4))):
        own = Memory(memory.entries_BGKH[:, chunks], memory.count_BG[:, chunks], chunks_of(packed(length), CHUNK))
        alone = part(x[:, begin : begin + length], packed(length), memory=own)
        torch.testing.assert_close(alone, whole[:, begin : begin + length])


def test_a_token_changes_nothing_before_it() -> None:
    check_causality(drawn(attention()), inputs_of(6), 6)


def test_decoding_is_the_whole_pass() -> None:
    check_decoding(drawn(attention()), inputs_of(9 + 3 + 6), [9, 3, 6], 3, str)


def test_decoding_with_memory_is_the_whole_pass() -> None:
    part, x = drawn(attention()), inputs_of(9)["x_BSH"]
    memory = memory_of([9], [0, 3, 2])
    expected = part(x, packed(9), memory=memory)
    state = {"latent": torch.full((1, 15, LATENT + ROPE), 1e3, dtype=torch.float64)}
    for t in range(9):
        chunk = slice(t // CHUNK, t // CHUNK + 1)
        now = Memory(memory.entries_BGKH[:, chunk], memory.count_BG[:, chunk], torch.zeros(1, 1, dtype=torch.int64))
        found = part.step(x[:, t], torch.tensor([t]), state, memory=now)
        torch.testing.assert_close(found, expected[:, t])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_memory_of_nothing_is_none_bit_for_bit(dtype: torch.dtype) -> None:
    part = drawn(attention(dtype), dtype)
    x, layout = inputs_of(11, dtype)["x_BSH"], packed(11)
    without = part(x, layout)
    empty = memory_of([11], [0, 0, 0])
    assert torch.equal(part(x, layout, memory=empty), without)
    none_at_all = Memory(empty.entries_BGKH[:, :, :0], empty.count_BG, empty.chunk_BS)
    assert torch.equal(part(x, layout, memory=none_at_all), without)
    some = part(x, layout, memory=memory_of([11], [0, 2, 0]))
    differs = (some != without).any(-1)[0]
    assert differs.tolist() == [CHUNK <= t < 2 * CHUNK for t in range(11)]


def test_gradients_with_and_without_memory() -> None:
    part, inputs, weight = drawn(attention()), inputs_of(6), draw(1, 6, WIDTH, seed=3)
    memory = memory_of([6], [0, 2])

    def loss(given: Inputs) -> Tensor:
        return (part(given["x_BSH"], packed(6), memory=memory) * weight).sum()

    check_gradients(part, loss, inputs)
    part.zero_grad()
    nothing = memory_of([6], [0, 0])
    gradients = []
    for held in (None, nothing):
        total = (part(inputs["x_BSH"], packed(6), memory=held) * weight).sum()
        names = [name for name, _ in part.named_parameters() if name != "linear_memory.weight"]
        gradients.append(torch.autograd.grad(total, [part.get_parameter(name) for name in names]))
    for without, empty in zip(*gradients, strict=True):
        assert torch.isfinite(empty).all() and torch.equal(without, empty)


def test_at_first_it_adds_nothing_and_learns_to() -> None:
    part, inputs = attention(), inputs_of(5)
    out = run(part, inputs, packed(5))
    assert torch.equal(out, inputs["x_BSH"])
    out.sum().backward()
    assert part.linear_proj.weight.grad is not None and part.linear_proj.weight.grad.abs().max() > 0


def test_chunks_begin_anew_with_each_document() -> None:
    assert chunks_of(packed(5, 3, 8), 4).tolist() == [[0] * 4 + [1] + [2] * 3 + [3] * 4 + [4] * 4]
