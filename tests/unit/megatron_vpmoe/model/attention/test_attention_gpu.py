"""On a GPU the backends equal the reference there: the compiled FlexAttention, and banded's plain operations."""

from __future__ import annotations

import pytest
import torch
from attention_cases import packed_layout, random_qkv
from torch import Tensor

from megatron_vpmoe.model.attention.backends import core_attention, select_backend
from megatron_vpmoe.model.attention.grape import alibi_slopes
from megatron_vpmoe.model.attention.masks import SequenceLayout

pytestmark = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA device: FlexAttention's compiled kernel exists only there"
)

GPU = torch.device("cuda")
LAYOUTS = {"whole tiles": ([256, 100, 156], [500, -12]), "a last tile in part": ([150, 90, 17, -43], [-20, 280])}
KINDS = [("flex", None, False), ("flex", None, True), ("flex", 24, False), ("flex", 128, False), ("banded", 24, False)]


def on_gpu(*rows: list[int]) -> SequenceLayout:
    layout = packed_layout(*rows)
    return SequenceLayout(layout.document_id.to(GPU), layout.position.to(GPU))


def run(inputs: tuple[Tensor, ...], layout: SequenceLayout, backend: str, window: int | None, alibi: bool):
    out = core_attention(
        *inputs[:3],
        layout=layout,
        window=window,
        alibi_slopes_H=alibi_slopes(inputs[0].shape[1], GPU) if alibi else None,
        sink_H=inputs[3] if len(inputs) > 3 else None,
        softmax_scale=0.2,
        backend=backend,
    )
    generator = torch.Generator().manual_seed(5)
    cotangent = torch.randn(out.shape, generator=generator).to(out)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@pytest.mark.parametrize("rows", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize(("backend", "window", "alibi"), KINDS)
@pytest.mark.parametrize("dim", [8, 32, 128])
@pytest.mark.parametrize("with_sink", [True, False])
def test_bf16_equals_the_reference_in_fp32(rows, backend, window, alibi, dim, with_sink) -> None:
    layout = on_gpu(*rows)
    inputs = random_qkv(layout_on_cpu(layout), dtype=torch.bfloat16, dim=dim)[: 4 if with_sink else 3]
    inputs = tuple(x.detach().to(GPU).requires_grad_() for x in inputs)
    ours = run(inputs, layout, backend, window, alibi)
    exact_inputs = tuple(x.detach().float().requires_grad_() for x in inputs)
    exact = run(exact_inputs, layout, "reference", window, alibi)
    assert ours[0].dtype == torch.bfloat16
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


def layout_on_cpu(layout: SequenceLayout) -> SequenceLayout:
    return SequenceLayout(layout.document_id.cpu(), layout.position.cpu())


@pytest.mark.parametrize("backend", ["flex", "banded"])
def test_documents_are_isolated(backend: str) -> None:
    layout, window = on_gpu([200, 184, -128]), 64
    inputs = tuple(x.detach().to(GPU) for x in random_qkv(layout_on_cpu(layout), dtype=torch.bfloat16, dim=32))
    disturbed = tuple(x.clone() for x in inputs[:3])
    for x in disturbed:
        x[0, :, 200:384] = 50.0
    before, after = (
        run(tuple(y.requires_grad_() for y in x), layout, backend, window, False)[0]
        for x in (inputs, (*disturbed, inputs[3]))
    )
    assert torch.equal(before[:, :, :200], after[:, :, :200]) and torch.equal(before[:, :, 384:], after[:, :, 384:])


def test_auto_takes_flex() -> None:
    assert select_backend("auto", window=None, device=GPU) == select_backend("auto", window=8, device=GPU) == "flex"


@pytest.mark.parametrize("window", [None, 128])
def test_memory_grows_with_the_sequence_not_with_its_square(window: int | None) -> None:
    def peak(length: int) -> int:
        layout = on_gpu([length // 2, length // 2])
        inputs = random_qkv(layout_on_cpu(layout), dtype=torch.bfloat16, dim=64)
        inputs = tuple(x.detach().to(GPU).requires_grad_() for x in inputs)
        run(inputs, layout, "flex", window, window is None)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run(inputs, on_gpu([length // 2, length // 2]), "flex", window, window is None)
        return torch.cuda.max_memory_allocated() - before

    assert peak(16_384) < 2.5 * peak(8_192)
