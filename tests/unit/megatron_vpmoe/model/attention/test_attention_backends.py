"""Every backend computes the same function as the reference, and nothing leaks between documents."""

from __future__ import annotations

import pytest
import torch
from attention_cases import packed_layout, random_qkv
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.model.attention.backends import banded, core_attention, select_backend
from megatron_vpmoe.model.attention.grape import alibi_slopes
from megatron_vpmoe.model.attention.masks import SequenceLayout

CPU, GPU = torch.device("cpu"), torch.device("cuda")
ROWS = {
    "one document": ([16],),
    "two rows, packed, padded": ([5, 7, 1, -3], [9, 6, -1]),
    "last block filled up": ([3, 4, 6], [13]),
    "shorter than the window": ([2], [1, 1]),
    "padding first": ([-3, 10], [-1, 12]),
}
# "banded off the CPU" is what banded computes where torch's fused CPU kernel is not to be had; "in chunks", one block
# of queries at a time.
LOCAL = [("banded", 4, False), ("banded in chunks", 4, False), ("banded off the CPU", 4, False), ("sdpa", 4, False)]
GLOBAL = [("sdpa", None, False), ("sdpa", None, True)]


def attend(
    qkv: tuple[Tensor, Tensor, Tensor],
    layout: SequenceLayout,
    sink: Tensor | None,
    *,
    backend: str,
    window: int | None,
    alibi: bool = False,
) -> Tensor:
    slopes = alibi_slopes(qkv[0].shape[1], CPU) if alibi else None
    with pytest.MonkeyPatch.context() as patch:
        if backend == "banded off the CPU":
            patch.setattr(banded._FusedTiles, "apply", banded._by_definition)
        if backend == "banded in chunks":
            patch.setattr(banded, "_BYTES_A_THREAD", 1)
        return core_attention(
            *qkv,
            layout=layout,
            window=window,
            alibi_slopes_H=slopes,
            sink_H=sink,
            softmax_scale=0.3,
            backend=backend.split()[0],
        )


def value_and_gradients(inputs: tuple[Tensor, ...], layout: SequenceLayout, **how: object) -> list[Tensor]:
    out = attend(inputs[:3], layout, inputs[3] if len(inputs) > 3 else None, **how)  # type: ignore[arg-type]
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out.dtype)
    return [out.detach(), *torch.autograd.grad(out, inputs, cotangent)]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
@pytest.mark.parametrize(("backend", "window", "alibi"), LOCAL + GLOBAL)
@pytest.mark.parametrize("with_sink", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 5e-6)])
def test_equals_reference(rows, backend, window, alibi, with_sink, dtype, tolerance) -> None:
    layout = packed_layout(*rows)
    inputs = random_qkv(layout, dtype=dtype)[: 4 if with_sink else 3]
    ours = value_and_gradients(inputs, layout, backend=backend, window=window, alibi=alibi)
    reference = value_and_gradients(inputs, layout, backend="reference", window=window, alibi=alibi)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("heads", "groups"), [(4, 4), (4, 1), (6, 2), (1, 1)])
@pytest.mark.parametrize(("backend", "window"), [("banded", 4), ("banded off the CPU", 4), ("sdpa", None)])
def test_heads_read_their_group(heads: int, groups: int, backend: str, window: int | None) -> None:
    layout = packed_layout([5, 6])
    inputs = random_qkv(layout, heads=heads, groups=groups)
    ours = value_and_gradients(inputs, layout, backend=backend, window=window)
    reference = value_and_gradients(inputs, layout, backend="reference", window=window)
    for mine, theirs in zip(ours, reference, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("backend", "window", "alibi"), LOCAL + GLOBAL)
def test_bf16_stays_close_to_fp64(backend: str, window: int | None, alibi: bool) -> None:
    layout = packed_layout([20, 28], [48])
    inputs = random_qkv(layout, dtype=torch.bfloat16, dim=16)
    ours = value_and_gradients(inputs, layout, backend=backend, window=window, alibi=alibi)
    exact_inputs = tuple(x.detach().double().requires_grad_() for x in inputs)
    exact = value_and_gradients(exact_inputs, layout, backend="reference", window=window, alibi=alibi)
    assert ours[0].dtype == torch.bfloat16 and ours[4].dtype == torch.float32
    for mine, theirs in zip(ours, exact, strict=True):
        assert (mine - theirs).norm() < 0.02 * theirs.norm()


@pytest.mark.parametrize(("backend", "window", "alibi"), [("reference", 4, False), *LOCAL, *GLOBAL])
def test_sink_gradients_by_finite_differences(backend: str, window: int | None, alibi: bool) -> None:
    layout = packed_layout([5, 4, -2])
    inputs = random_qkv(layout, heads=2, groups=1, dim=2)
    assert torch.autograd.gradcheck(
        lambda *x: attend(x[:3], layout, x[3], backend=backend, window=window, alibi=alibi), inputs
    )


@pytest.mark.parametrize(("backend", "window", "alibi"), [("reference", None, True), *LOCAL, *GLOBAL])
def test_sink_of_minus_infinity_is_a_plain_softmax(backend: str, window: int | None, alibi: bool) -> None:
    layout = packed_layout([6, 7])
    inputs = random_qkv(layout)
    without = torch.full_like(inputs[3], -torch.inf).requires_grad_()
    ours = value_and_gradients((*inputs[:3], without), layout, backend=backend, window=window, alibi=alibi)
    plain = value_and_gradients(inputs[:3], layout, backend=backend, window=window, alibi=alibi)
    for mine, theirs in zip(ours, plain, strict=False):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)
    assert ours[4].abs().max() == 0


@pytest.mark.parametrize(("backend", "window", "alibi"), [("reference", None, True), *LOCAL, *GLOBAL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_isolated_bit_for_bit(backend: str, window: int | None, alibi: bool, dtype: torch.dtype) -> None:
    layout = packed_layout([37, 50, 29, -12], [60, 68])
    inputs = random_qkv(layout, dtype=dtype, dim=16)
    disturbed = tuple(x.detach().clone() for x in inputs[:3])
    for x in disturbed:
        x[0, :, 37:87] = 100 * torch.randn_like(x[0, :, 37:87])  # the second document of the first row
        x[0, :, -12:] = 100
    how = {"backend": backend, "window": window, "alibi": alibi}
    before = value_and_gradients(inputs, layout, **how)
    after = value_and_gradients((*(x.requires_grad_() for x in disturbed), inputs[3]), layout, **how)
    others = torch.ones(2, 128, dtype=torch.bool)
    others[0, 37:87] = others[0, -12:] = False
    for mine, theirs in zip(before[:4], after[:4], strict=True):
        assert torch.equal(mine.transpose(1, 2)[others], theirs.transpose(1, 2)[others])
        assert not torch.equal(mine.transpose(1, 2)[~others], theirs.transpose(1, 2)[~others])
        assert theirs.isfinite().all()


@pytest.mark.parametrize(("backend", "window"), [("reference", 8), ("banded", 8), ("reference", None), ("sdpa", None)])
def test_no_token_reads_the_future_or_beyond_the_window(backend: str, window: int | None) -> None:
    layout = packed_layout([40])
    q, k, v, sink = (x.detach() for x in random_qkv(layout, dtype=torch.float32))
    before = attend((q, k, v), layout, sink, backend=backend, window=window)
    changed = 17
    k, v = k.clone(), v.clone()
    k[:, :, changed], v[:, :, changed] = 3.0, -3.0
    after = attend((q, k, v), layout, sink, backend=backend, window=window)
    rows = [i for i in range(40) if not torch.equal(before[:, :, i], after[:, :, i])]
    assert rows == list(range(changed, 40 if window is None else changed + window))


@pytest.mark.parametrize(("backend", "window"), [("banded", 4), ("banded", 16), ("sdpa", None)])
def test_any_memory_order(backend: str, window: int | None) -> None:
    """Inputs whose head dimension is strided, and the gradient of a sum, which has no memory of its own."""
    layout = packed_layout([9, 7])
    inputs = random_qkv(layout, dim=16)
    strided = tuple(x.detach().transpose(-1, -2).contiguous().transpose(-1, -2).requires_grad_() for x in inputs[:3])
    how = {"window": window}
    ours = attend(strided, layout, inputs[3], backend=backend, **how)
    theirs = attend(inputs[:3], layout, inputs[3], backend="reference", **how)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad(ours.sum(), strided), torch.autograd.grad(theirs.sum(), inputs[:3])
    for mine, reference in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-12, atol=1e-12)


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("backend", ["banded", "banded off the CPU"])
def test_banded_never_holds_all_pairs(backend: str) -> None:
    def largest(length: int) -> int:
        layout = packed_layout([length - 100, 60, -40])
        inputs = random_qkv(layout, heads=2, groups=1, dim=4, dtype=torch.float32)
        with LargestTensor() as recorded:
            attend(inputs[:3], layout, inputs[3], backend=backend, window=8).sum().backward()
        return recorded.elements

    assert largest(2048) == 2 * largest(1024) < 1024 * 1024


def test_auto_takes_the_fastest_that_can() -> None:
    assert select_backend("auto", window=128, device=CPU) == "banded"
    assert select_backend("auto", window=None, device=CPU) == "sdpa"
    assert select_backend("auto", window=128, device=CPU, alibi=True) == "sdpa"
    assert select_backend("auto", window=128, device=GPU) == select_backend("auto", window=None, device=GPU) == "flex"
    assert select_backend("banded", window=128, device=GPU) == "banded"
    assert select_backend("reference", window=128, device=CPU) == "reference"


def test_impossible_backends_are_refused_by_name() -> None:
    with pytest.raises(DeviceError, match="'sdpa' runs on the CPU only"):
        select_backend("sdpa", window=None, device=GPU)
    with pytest.raises(DeviceError, match="'flex' cannot train on the CPU"):
        select_backend("flex", window=4, device=CPU)
    layout = packed_layout([5])
    for window in (None, 4):
        with pytest.raises(ValueError, match="'banded' cannot run"):
            attend(random_qkv(layout)[:3], layout, None, backend="banded", window=window, alibi=window is not None)


def test_rows_that_do_not_match_the_layout_are_refused() -> None:
    layout = packed_layout([5])
    q, k, v, _ = random_qkv(layout)
    for queries, keys in ((5, 4), (4, 5)):
        with pytest.raises(ValueError, match=f"{queries} queries and {keys} keys for a layout of 5 rows"):
            attend((q[:, :, :queries], k[:, :, :keys], v[:, :, :keys]), layout, None, backend="banded", window=4)
