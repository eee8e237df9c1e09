"""What every part of nano_think is held to: packed rows, causality, decoding, gradients; and sizes to do it at."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.transformer_config import VPTransformerConfig, transformer_config
from megatron_vpmoe.think.decoding import Past
from tests.tiny import NANO_MOE, tiny_config

LEFTOVER = 1e3
"""What rows before have left in columns that a row has not reached."""


def part_config(dtype: torch.dtype = torch.float64, **changes: object) -> VPTransformerConfig:
    """Four heads of 8 over a width of 32, SwiGLU of 48, RoPE."""
    dense = {"num_experts": None, "moe_shared_expert_intermediate_size": None}
    config = transformer_config(tiny_config(**{**NANO_MOE, **dense, **changes}))
    config.params_dtype = dtype
    return config


def drawn(part: Module, dtype: torch.dtype = torch.float64, seed: int = 0, scale: float = 0.3) -> Any:
    """A part whose every weight says something, those that begin at zero too."""
    generator = torch.Generator().manual_seed(seed)
    part = part.to(dtype)
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator, dtype=dtype))
    return part


def packed(*lengths: int, padding: int = 0) -> SequenceLayout:
    """One row of documents, and padding behind them."""
    document = [n for n, length in enumerate(lengths) for _ in range(length)] + [-1] * padding
    position = [at for length in (*lengths, padding) for at in range(length)]
    return SequenceLayout(torch.tensor([document], dtype=torch.int32), torch.tensor([position]))


def chunks_of(layout: SequenceLayout, size: int) -> Tensor:
    """int64 [B, S]: the chunk of each position, counted in its row; a chunk is ``size`` tokens of one document."""
    return (layout.position % size == 0).cumsum(-1) - 1


def apart(together: Tensor, lengths: Sequence[int]) -> list[Tensor]:
    """The documents of one row [1, S, ...], each [1, L, ...]."""
    return list(together[:, : sum(lengths)].split(list(lengths), 1))


Inputs = dict[str, Tensor]
"""Of one row [1, S, ...]: ``x_BSH``, and keywords of ``forward`` by their names."""


def run(part: Any, inputs: Inputs, layout: SequenceLayout, past: Past | None = None) -> Tensor:
    """``forward`` of a part."""
    keywords = {name: value for name, value in inputs.items() if name != "x_BSH"}
    return part(inputs["x_BSH"], layout, past, **keywords)


def check_packing(part: Any, inputs: Inputs, lengths: Sequence[int]) -> None:
    """A packed row is its documents alone, padding is one of its own, and no document changes a bit of another's.

    ``inputs`` are of the documents and of 3 positions of padding.
    """
    whole = run(part, inputs, packed(*lengths, padding=3))
    alone = [apart(value, lengths) for value in inputs.values()]
    for number, (length, found) in enumerate(zip(lengths, apart(whole, lengths), strict=True)):
        one = {name: value[number] for name, value in zip(inputs, alone, strict=True)}
        torch.testing.assert_close(run(part, one, packed(length)), found)
    other = dict(inputs)
    begin = lengths[0]
    other["x_BSH"] = inputs["x_BSH"].clone()
    other["x_BSH"][:, begin : begin + lengths[1]] += 1
    changed = run(part, other, packed(*lengths, padding=3))
    same = torch.ones(whole.shape[1], dtype=torch.bool)
    same[begin : begin + lengths[1]] = False
    assert torch.equal(whole[:, same], changed[:, same]) and not torch.equal(whole, changed)


def check_causality(part: Any, inputs: Inputs, length: int) -> None:
    """A token changes itself or something behind it, and no bit before it; ``length`` of one document."""
    layout = packed(length)
    whole = run(part, inputs, layout)
    for place in range(length):
        other = {**inputs, "x_BSH": inputs["x_BSH"].clone()}
        other["x_BSH"][:, place] += 1
        changed = run(part, other, layout)
        assert torch.equal(whole[:, :place], changed[:, :place])
        assert not torch.equal(whole[:, place:], changed[:, place:])


def check_decoding(
    part: Any,
    inputs: Inputs,
    lengths: Sequence[int],
    behind: int,
    per_step: Callable[[str], str],
    tolerance: float | None = None,
) -> None:
    """Documents begun in one packed row and continued token by token, all at once, are those of one pass.

    Args:
        part: with ``entries`` and ``step``.
        inputs: of a row that packs the whole documents.
        lengths: of the whole documents.
        behind: tokens of each that are decoded; a document of so many has no past at all.
        per_step: a keyword's name in ``step`` for its name in ``forward``.
        tolerance: relative and absolute; None: that of the dtype.
    """
    whole = {name: apart(value, lengths) for name, value in inputs.items()}
    expected = apart(run(part, inputs, packed(*lengths)), lengths)
    begun = [length - behind for length in lengths]
    with_past = [n for n, length in enumerate(begun) if length]
    prefix = {name: torch.cat([each[n][:, : begun[n]] for n in with_past], 1) for name, each in whole.items()}
    layout = packed(*(begun[n] for n in with_past))
    past = Past.of(layout)
    run(part, prefix, layout, past)
    state = _filled(part, past, begun)
    for offset in range(behind):
        position = torch.tensor([length + offset for length in begun])
        now = {
            name: torch.stack([value[0, at] for value, at in zip(each, position.tolist(), strict=True)])
            for name, each in whole.items()
        }
        keywords = {per_step(name): value for name, value in now.items() if name != "x_BSH"}
        found = part.step(now["x_BSH"], position, state, **keywords)
        wanted = torch.stack([value[0, at] for value, at in zip(expected, position.tolist(), strict=True)])
        torch.testing.assert_close(found, wanted, rtol=tolerance, atol=tolerance)


def _filled(part: Any, past: Past, begun: Sequence[int]) -> dict[str, Tensor]:
    """The decoding state of a row a document, as an engine keeps it."""
    state, columns = {}, max(begun) + 20
    with_past = [n for n, length in enumerate(begun) if length]
    for name, entry in part.entries().items():
        kept = past.values[name]
        shape = (len(begun), columns, *entry.shape) if entry.grows else (len(begun), *entry.shape)
        held = torch.full(shape, LEFTOVER if entry.grows else 0.0, dtype=entry.dtype)
        pieces = [kept[span] for span in past.spans] if entry.grows else kept.unbind()
        for n, piece in zip(with_past, pieces, strict=True):
            if entry.grows:
                held[n, : len(piece)] = piece
            else:
                held[n] = piece
        state[name] = held
    return state


def check_gradients(part: Any, loss: Callable[[Inputs], Tensor], inputs: Inputs) -> None:
    """fp64: along a random direction of each parameter and of ``x_BSH``, the gradient is the central difference."""
    tensors = {**dict(part.named_parameters()), "x_BSH": inputs["x_BSH"].clone().requires_grad_()}
    value = loss({**inputs, "x_BSH": tensors["x_BSH"]})
    gradients = torch.autograd.grad(value, list(tensors.values()))
    generator, step = torch.Generator().manual_seed(5), 1e-5
    for (name, tensor), gradient in zip(tensors.items(), gradients, strict=True):
        assert gradient.abs().max() > 0, f"{name} has no gradient"
        along = torch.randn(tensor.shape, generator=generator, dtype=tensor.dtype)
        ends = []
        with torch.no_grad():
            for sign in (1, -1):
                tensor.add_(sign * step * along)
                ends.append(loss({**inputs, "x_BSH": tensors["x_BSH"]}))
                tensor.sub_(sign * step * along)
        slope, found = (ends[0] - ends[1]) / (2 * step), (gradient * along).sum()
        torch.testing.assert_close(found, slope, rtol=1e-5, atol=1e-8, msg=lambda said, of=name: f"{of}: {said}")
