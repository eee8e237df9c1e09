"""The assembled model: what a position may depend on, and that its ways of computing one thing agree."""

from __future__ import annotations

import pytest
import torch

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

SEQ, VOCAB = 48, 64


def lively(model: VPModel) -> VPModel:
    """Move what starts at a neutral value (sinks, λs, biases) away from it, so that every part takes part."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sink" in name or "bias" in name or "layernorm" in name:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif "value_residual_scale" in name:
                parameter.fill_(0.6)
            elif parameter.dim() >= 2:
                parameter *= 4
    return model


def layout_of_documents(*lengths: int, padding: int = 0) -> SequenceLayout:
    ids = [i for i, n in enumerate(lengths) for _ in range(n)] + [-1] * padding
    positions = [t for n in lengths for t in range(n)] + [0] * padding
    return SequenceLayout(torch.tensor([ids], dtype=torch.int32), torch.tensor([positions]))


def logits(model: VPModel, tokens: torch.Tensor, layout: SequenceLayout) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens, layout).logits()


@pytest.mark.parametrize("num_experts", [8, None])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_a_conversation_does_not_see_its_neighbours(num_experts: int | None, backend: str) -> None:
    """Bit for bit: perturb one conversation of a packed row, and the others' logits do not move."""
    model = lively(build_model(tiny_config(num_experts=num_experts, attention_backend=backend)).eval())
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, VOCAB, (1, SEQ), generator=generator)
    layout = layout_of_documents(14, 20, 9, padding=5)
    before = logits(model, tokens, layout)
    perturbed = tokens.clone()
    perturbed[:, 14:34] = torch.randint(1, VOCAB, (1, 20), generator=generator)
    after = logits(model, perturbed, layout)
    assert not torch.equal(after[:, 14:34], before[:, 14:34])
    assert torch.equal(after[:, :14], before[:, :14])
    assert torch.equal(after[:, 34:], before[:, 34:])


def test_a_packed_conversation_is_as_if_alone() -> None:
    model = lively(build_model(tiny_config()).eval())
    tokens = torch.randint(1, VOCAB, (1, 34), generator=torch.Generator().manual_seed(0))
    packed = logits(model, tokens, layout_of_documents(14, 20))
    alone = logits(model, tokens[:, 14:], layout_of_documents(20))
    torch.testing.assert_close(packed[:, 14:], alone, rtol=1e-4, atol=1e-5)


def test_causality() -> None:
    model = lively(build_model(tiny_config()).eval())
    tokens = torch.randint(1, VOCAB, (1, 40), generator=torch.Generator().manual_seed(0))
    before = logits(model, tokens, layout_of_documents(40))
    perturbed = tokens.clone()
    perturbed[0, 25] = (perturbed[0, 25] + 1) % VOCAB
    after = logits(model, perturbed, layout_of_documents(40))
    torch.testing.assert_close(after[:, :25], before[:, :25], rtol=0, atol=1e-6)
    assert (after[:, 25:] - before[:, 25:]).abs().amax(-1).min() > 1e-4


def test_fp32_islands_in_a_bf16_model() -> None:
    model = build_model(tiny_config(bf16=True))
    wide = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert wide == {name for name, _ in model.named_parameters() if name.rsplit(".", 1)[-1] in ISLANDS}
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())
    assert {p.dtype for p in model.bfloat16().parameters()} == {torch.float32, torch.bfloat16}
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())


ISLANDS = {"sink", "grape_log_freq", "value_residual_scale"}
