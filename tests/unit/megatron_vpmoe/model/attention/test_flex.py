"""The flex backend without a GPU: its table of tiles, its values, its gradients, and that it compiles once.

Torch's FlexAttention computes densely on a CPU, and refuses gradients there although that dense formulation has them.
The refusal is lifted here, so that what stands around the kernel (mask, bias, scale, sink, the gradient through the
log-sum-exp) is held to the reference. The compiled kernel itself is for test_attention_gpu.py.
"""

from __future__ import annotations

import pytest
import torch
from attention_cases import packed_layout, random_qkv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention import flex_attention as torch_flex
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vpmoe.model.attention.backends import core_attention, flex
from megatron_vpmoe.model.attention.grape import alibi_slopes
from megatron_vpmoe.model.attention.masks import SequenceLayout

PACKED = ([150, 90, 17, -43], [-20, 280])
KINDS = {"global": (None, False), "global with bias": (None, True), "local": (24, False), "one tile wide": (129, False)}


@pytest.fixture
def gradients_on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_flex, "_validate_device", lambda *_: None)


def attend(inputs: tuple[Tensor, ...], layout: SequenceLayout, backend: str, window: int | None, alibi: bool) -> Tensor:
    return core_attention(
        *inputs[:3],
        layout=layout,
        window=window,
        alibi_slopes_H=alibi_slopes(inputs[0].shape[1], torch.device("cpu")) if alibi else None,
        sink_H=inputs[3] if len(inputs) > 3 else None,
        softmax_scale=0.3,
        backend=backend,
    )


@pytest.mark.usefixtures("gradients_on_cpu")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(("window", "alibi"), KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("with_sink", [True, False])
def test_values_and_gradients_equal_the_reference(window: int | None, alibi: bool, with_sink: bool) -> None:
    layout = packed_layout(*PACKED)
    inputs = random_qkv(layout, dim=8)[: 4 if with_sink else 3]  # heads of 8 are filled up to the kernel's 16
    results = []
    for backend in ("flex", "reference"):
        out = attend(inputs, layout, backend, window, alibi)
        cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=out.dtype)
        results.append([out.detach(), *torch.autograd.grad(out, inputs, cotangent)])
    for mine, reference in zip(*results, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_bf16_keeps_statistics_and_slopes_in_fp32() -> None:
    layout = packed_layout([300])
    q, k, v, sink = (x.detach() for x in random_qkv(layout, dtype=torch.bfloat16, dim=16))
    ours = attend((q, k, v, sink), layout, "flex", None, True)
    exact = attend((q.double(), k.double(), v.double(), sink.double()), layout, "reference", None, True)
    assert ours.dtype == torch.bfloat16
    assert (ours - exact).norm() < 0.02 * exact.norm()


def test_sink_by_log_sum_exp_has_the_right_gradient() -> None:
    """The step after the kernel by itself: out and lse as functions of the scores, against finite differences."""
    generator = torch.Generator().manual_seed(2)
    score = torch.randn(2, 3, 4, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    sink = torch.randn(3, generator=generator, dtype=torch.float64, requires_grad=True)

    def weights(score: Tensor, sink: Tensor) -> Tensor:
        return flex.with_sink(score.softmax(-1), score.logsumexp(-1), sink)

    assert torch.autograd.gradcheck(weights, (score, sink))
    by_definition = torch.cat([score, sink.view(1, 3, 1, 1).expand(2, 3, 4, 1)], dim=-1).softmax(-1)[..., :-1]
    torch.testing.assert_close(weights(score, sink), by_definition, rtol=1e-13, atol=1e-13)


rows = st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=6).map(
    lambda runs: [-n if padding else n for n, padding in runs]
)


@settings(max_examples=40)
@given(rows, st.sampled_from([None, 1, 100, 128, 129, 256, 400]))
def test_tiles_hold_every_visible_pair_and_no_other(lengths: list[int], window: int | None) -> None:
    """Padding may stand anywhere, in several runs."""
    layout = packed_layout(lengths, [sum(map(abs, lengths))])
    mask, length = flex.block_mask(layout, window), layout.length
    visible = layout.visible(window)[:, 0]
    by_mod = dense(mask, length)
    assert torch.equal(by_mod, visible), "the rule within a tile"
    asked = tiles_of(mask.kv_num_blocks, mask.kv_indices, length)
    whole = tiles_of(mask.full_kv_num_blocks, mask.full_kv_indices, length)
    assert not (asked & whole).any()
    assert torch.equal((asked & by_mod) | whole, visible), "what the kernel computes"


def dense(mask: torch_flex.BlockMask, length: int) -> Tensor:
    index = torch.arange(length)
    batches = [
        mask.mask_mod(torch.tensor(b), torch.tensor(0), index[:, None], index) for b in range(mask.kv_indices.shape[0])
    ]
    return torch.stack(batches)


def tiles_of(count: Tensor | None, columns: Tensor | None, length: int) -> Tensor:
    """Bool [B, S, S] that is True on the listed tiles."""
    assert count is not None and columns is not None
    batch, _, tiles, _ = columns.shape
    out = torch.zeros(batch, tiles, tiles, dtype=torch.bool)
    for b in range(batch):
        for row in range(tiles):
            out[b, row, columns[b, 0, row, : count[b, 0, row]].long()] = True
    return out.repeat_interleave(flex.TILE, 1).repeat_interleave(flex.TILE, 2)[:, :length, :length]


def test_nothing_the_kernel_could_skip_is_listed() -> None:
    """One row of 8 tiles, documents of 2, 3 and 3 tiles: 3 + 6 + 6 tiles of 64, of which the diagonal is partial."""
    mask = flex.block_mask(packed_layout([256, 384, 384]), None)
    assert mask.full_kv_num_blocks is not None
    assert mask.kv_num_blocks[0, 0].tolist() == [1] * 8
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 0, 1, 2, 0, 1, 2]
    local = flex.block_mask(packed_layout([1024]), 128)
    assert int(local.kv_num_blocks.sum()) == 15 and not local.full_kv_num_blocks.any()  # type: ignore[union-attr]


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("window", [None, 128])
def test_the_mask_never_holds_all_pairs(window: int | None) -> None:
    length = 32_768
    layout = packed_layout([10_000, 20_000, 2_700, -68])
    with LargestTensor() as recorded:
        flex.block_mask(layout, window)
    assert recorded.elements <= 2 * (length // flex.TILE) ** 2 + length < length**2 / 1000


def test_layers_of_a_kind_share_one_mask() -> None:
    layout = packed_layout([60, 40])
    inputs = tuple(x.detach() for x in random_qkv(layout, dtype=torch.float32))
    built = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(flex, "block_mask", lambda layout, window: built.append(window))
        patch.setattr(flex, "_attend", lambda q, *_: q)
        for window in (None, 8, 8, None, 8):
            attend(inputs, layout, "flex", window, False)
    assert built == [None, 8]


@pytest.fixture
def counter():
    """The compiler's front end alone, counting graphs."""
    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


@pytest.mark.usefixtures("gradients_on_cpu")
def test_traced_whole_and_once_for_all_batches(counter: CompileCounterWithBackend) -> None:
    """Forward and backward: one graph, and none more for other documents."""
    run = flex._compiled(counter)
    for lengths in ([100, 60, 32], [192], [50, 50, 50, -42]):
        layout = packed_layout(lengths)
        inputs = random_qkv(layout, dim=16)
        slopes = alibi_slopes(4, torch.device("cpu"))
        out = run(*inputs[:3], flex.block_mask(layout, None), slopes, inputs[3], 0.3)
        expected = attend(inputs, layout, "reference", None, True)
        torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(x.sum(), inputs) for x in (out, expected))
        for mine, theirs in zip(*gradients, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # traced, torch's has fp32 in places
    assert counter.frame_count == 1


@pytest.mark.slow
def test_more_graphs_than_torch_allows_by_default(counter: CompileCounterWithBackend) -> None:
    """Windows, biases and lengths multiply; the first two lengths of each kind take a graph, further ones none."""
    run, counts = flex._compiled(counter), []
    for length in (128, 160, 192):
        for window in (None, 16, 32):
            for heads in (2, 4):
                layout = packed_layout([length])
                q, k, v, sink = (x.detach() for x in random_qkv(layout, heads=heads, dim=16, dtype=torch.float32))
                run(q, k, v, flex.block_mask(layout, window), None, sink, 0.3)
        counts.append(counter.frame_count)
    assert 8 < counts[1] == counts[2] < flex._GRAPHS
