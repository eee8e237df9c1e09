"""The parts of attention against the per-token fp64 reference in ref/, and the rotation against HF's and Megatron's."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_vpmoe.model.attention.backends import BACKENDS, core_attention
from megatron_vpmoe.model.attention.grape import alibi_slopes, initial_log_frequencies, rotate, rotation_angles
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.attention.tpa import TPAGeometry, contract_factors
from megatron_vpmoe.model.attention.value_residual import mix_first_value
from ref import attention as naive

CPU = torch.device("cpu")
DOCUMENTS = [0] * 5 + [1] * 4 + [-1] * 2


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).requires_grad_()


def layout_of(documents: list[int]) -> SequenceLayout:
    row = torch.tensor([documents], dtype=torch.int32)
    return SequenceLayout(row, torch.zeros_like(row, dtype=torch.int64))


def check(ours: Tensor, theirs: Tensor, inputs: tuple[Tensor, ...], tolerance: float = 1e-11) -> None:
    """Equal values, and equal gradients under one random cotangent."""
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    cotangent = draw(*ours.shape, seed=99).detach().to(ours.dtype)
    gradients = (torch.autograd.grad(x, inputs, cotangent, retain_graph=True) for x in (ours, theirs))
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=tolerance, atol=tolerance)


# Backend, window, ALiBi.
CASES = [
    ("reference", None, False),
    ("reference", None, True),
    ("reference", 3, False),
    ("sdpa", None, False),
    ("sdpa", None, True),
    ("banded", 3, False),
    ("banded", 1, False),
    ("banded", 16, False),
]
NOT_ON_CPU = {"flex"}


def test_every_backend_of_the_cpu_is_held_to_the_definition() -> None:
    assert {backend for backend, _, _ in CASES} == set(BACKENDS) - NOT_ON_CPU


@pytest.mark.parametrize(("backend", "window", "alibi"), CASES)
@pytest.mark.parametrize("with_sink", [True, False])
def test_backends_equal_the_definition(backend: str, window: int | None, alibi: bool, with_sink: bool) -> None:
    heads, groups, dim, length = 6, 2, 4, len(DOCUMENTS)
    q, k, v = draw(length, heads, dim), draw(length, groups, dim, seed=1), draw(length, groups, dim, seed=2)
    sink = draw(heads, seed=3) if with_sink else None
    ours = core_attention(
        *(x.transpose(0, 1).unsqueeze(0) for x in (q, k, v)),
        layout=layout_of(DOCUMENTS),
        window=window,
        alibi_slopes_H=alibi_slopes(heads, CPU) if alibi else None,
        sink_H=sink,
        softmax_scale=dim**-0.5,
        backend=backend,
    )[0].transpose(0, 1)
    theirs = naive.attention(q, k, v, document=DOCUMENTS, window=window, alibi=alibi, sink=sink)
    # Six heads: ALiBi's interleaved slopes are fp32 in the product.
    check(ours, theirs, (q, k, v) if sink is None else (q, k, v, sink), 1e-6 if alibi else 1e-11)


def test_grape_m_equals_the_definition() -> None:
    scale, positions = 16.0, [0, 1, 2, 0, 1, 1999]
    log_frequency = (initial_log_frequencies(8, 1e6, scale).double() + draw(4).detach()).requires_grad_()
    x = draw(len(positions), 1, 3, 8, seed=1)
    angle = rotation_angles(torch.tensor([positions]), torch.exp(log_frequency / scale))
    frequency = naive.grape_m_frequency(log_frequency, scale)
    theirs = torch.stack(
        [
            torch.stack([naive.rotate(x[n, 0, h], t, frequency) for h in range(3)]).unsqueeze(0)
            for n, t in enumerate(positions)
        ]
    )
    check(rotate(x, angle), theirs, (x, log_frequency), 1e-9)


def test_tpa_equals_the_definition() -> None:
    g = TPAGeometry(num_heads=4, num_groups=2, head_dim=6, q_rank=3, rank=2)
    a, b = draw(3, 1, sum(g.a_sizes)), draw(3, 1, sum(g.b_sizes), seed=1)
    for index, (heads, rank) in enumerate(((4, 3), (2, 2), (2, 2))):
        begin_a, begin_b = sum(g.a_sizes[:index]), sum(g.b_sizes[:index])
        theirs = torch.stack(
            [naive.tensor_product(a[t, 0, begin_a:], b[t, 0, begin_b:], heads, rank, 6) for t in range(3)]
        ).unsqueeze(1)
        check(contract_factors(a, b, g)[index], theirs, (a, b))


def test_value_residual_equals_the_definition() -> None:
    value, first, scale = draw(3, 2, 2, 4), draw(3, 2, 2, 4, seed=1), draw(1, seed=2).squeeze(0)
    check(mix_first_value(value, first, scale), naive.value_residual(value, first, scale), (value, first, scale), 1e-14)


def test_rotation_equals_hf() -> None:
    from transformers.models.llama import modeling_llama as llama

    x, frequency = draw(7, 2, 3, 16), torch.exp(-torch.arange(8, dtype=torch.float64))
    angle = rotation_angles(torch.arange(14).view(2, 7), frequency)
    cos, sin = (torch.cat([f(angle), f(angle)], dim=-1)[:, :, 0].transpose(0, 1) for f in (torch.cos, torch.sin))
    theirs, _ = llama.apply_rotary_pos_emb(x.permute(1, 2, 0, 3), x.permute(1, 2, 0, 3), cos, sin)
    check(rotate(x, angle), theirs.permute(2, 0, 1, 3), (x,), 1e-13)


def test_rotation_equals_megatron() -> None:
    from megatron.core.models.common.embeddings import rope_utils

    x, frequency = draw(7, 2, 3, 16), torch.exp(-torch.arange(8, dtype=torch.float64))
    angle = rotation_angles(torch.arange(7).expand(2, 7), frequency)
    doubled = torch.cat([angle, angle], dim=-1)[:, :1]
    theirs = rope_utils._apply_rotary_pos_emb_bshd(x, doubled, rotary_interleaved=False)
    check(rotate(x, angle), theirs, (x,), 1e-13)
