"""The scan, by the kernel and by torch, is the recurrence one step after another, and so are its gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.think import scan_kernel
from megatron_vpmoe.think.scan import ChunkedScan, scan_form, selective_scan
from ref import state_space as reference

Given = tuple[Tensor, ...]


def drawn(length: int, channels: int, states: int, *, seed: int, largest_step: float, dtype: torch.dtype) -> Given:
    """Step, x, A, B and C, to be differentiated."""
    g = torch.Generator().manual_seed(seed)
    step = torch.rand(length, channels, generator=g, dtype=torch.float64) * largest_step + 1e-4
    x = torch.randn(length, channels, generator=g, dtype=torch.float64)
    a = -torch.rand(states, channels, generator=g, dtype=torch.float64) * states - 0.1
    b, c = (torch.randn(length, states, generator=g, dtype=torch.float64) for _ in range(2))
    return tuple(each.to(dtype).requires_grad_() for each in (step, x, a, b, c))


def spans(begins: Tensor) -> list[slice]:
    starts = begins.nonzero().flatten().tolist()
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(begins)], strict=True)]


def by_reference(given: Given, begins: Tensor) -> tuple[Tensor, Tensor]:
    step, x, a, b, c = given
    parts = [reference.scan(step[s], x[s], a, b[s], c[s]) for s in spans(begins)]
    return torch.cat([y for y, _ in parts]), parts[-1][1]


def by_product(given: Given, begins: Tensor) -> tuple[Tensor, Tensor]:
    step, x, a, b, c = given
    return selective_scan(step, x, a, b, c, begins)


def by_torch(given: Given, begins: Tensor) -> tuple[Tensor, Tensor]:
    decay = given[0].detach().masked_fill(begins[:, None], torch.inf)
    return ChunkedScan.apply(decay, *given)  # type: ignore[return-value]


def with_gradients(form, given: Given, begins: Tensor) -> list[Tensor]:
    """y, the last state, and the gradients of a weighted sum of y."""
    given = tuple(each.detach().requires_grad_() for each in given)
    y, state = form(given, begins)
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return [y.detach(), state.detach(), *torch.autograd.grad((y * weight).sum(), given)]


def assert_equal(found: list[Tensor], expected: list[Tensor], tolerance: float) -> None:
    for place, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        difference = (ours.double() - theirs.double()).abs().max()
        assert difference <= tolerance * max(1.0, theirs.abs().max()), (place, difference)


@given(
    length=st.integers(1, 70),
    channels=st.integers(1, 37),
    states=st.sampled_from([1, 4, 16, 21]),
    largest_step=st.sampled_from([0.1, 3.0, 80.0]),
    seed=st.integers(0, 2**16),
    cuts=st.lists(st.integers(1, 69), max_size=4),
)
@settings(max_examples=30, deadline=None)
def test_both_forms_are_the_recurrence(
    length: int, channels: int, states: int, largest_step: float, seed: int, cuts: list[int]
) -> None:
    """Of any sizes and documents; also where a decay leaves nothing, over which no product may be divided."""
    exact = drawn(length, channels, states, seed=seed, largest_step=largest_step, dtype=torch.float64)
    begins = torch.zeros(length, dtype=torch.bool)
    begins[[0, *(cut for cut in cuts if cut < length)]] = True
    expected = with_gradients(by_reference, exact, begins)
    assert_equal(with_gradients(by_product, exact, begins), expected, 1e-12)
    single = tuple(each.float() for each in exact)
    assert_equal(with_gradients(by_product, single, begins), expected, 1e-5)
    assert_equal(with_gradients(by_torch, single, begins), expected, 1e-5)


def test_at_full_size() -> None:
    given_ = drawn(512, 768, 16, seed=1, largest_step=0.1, dtype=torch.float32)
    begins = torch.zeros(512, dtype=torch.bool)
    begins[[0, 200, 203]] = True
    expected = with_gradients(by_reference, tuple(each.double() for each in given_), begins)
    found = with_gradients(by_product, given_, begins)
    assert_equal(found, expected, 1e-5)
    again = with_gradients(by_product, given_, begins)
    assert all(torch.equal(one, other) for one, other in zip(found, again, strict=True))


def test_gradients_by_finite_differences() -> None:
    given_ = drawn(21, 3, 2, seed=2, largest_step=1.0, dtype=torch.float64)
    begins = torch.zeros(21, dtype=torch.bool)
    begins[[0, 9]] = True
    assert torch.autograd.gradcheck(lambda *g: by_product(g, begins)[0], given_)


def test_a_form_for_each_device() -> None:
    assert scan_form("cpu", torch.float32) != scan_form("cpu", torch.float64) == scan_form("cuda", torch.float32)


def test_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    scan_kernel.library.cache_clear()
    try:
        with pytest.raises(DeviceError, match="no C compiler") as raised:
            scan_kernel.library()
        assert "CC" in str(raised.value)
    finally:
        scan_kernel.library.cache_clear()


def test_a_compiler_that_fails(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:  # type: ignore[no-untyped-def]
    monkeypatch.setenv("CC", "false")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    scan_kernel.library.cache_clear()
    try:
        with pytest.raises(DeviceError, match="could not compile"):
            scan_kernel.library()
    finally:
        scan_kernel.library.cache_clear()
