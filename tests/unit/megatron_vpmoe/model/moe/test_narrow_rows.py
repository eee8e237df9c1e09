"""Experts' products in a narrow format: what is rounded, how far, in which blocks; and that the host never waits."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_layer import get_default_pg_collection
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional

from megatron_vpmoe.config import load_config, memory_estimate
from megatron_vpmoe.config.expert_formats import FORMATS
from megatron_vpmoe.errors import DeviceError
from megatron_vpmoe.model.moe import expert_rows
from megatron_vpmoe.model.moe import narrow_rows as narrow_module
from megatron_vpmoe.model.moe.experts import StackedExperts
from megatron_vpmoe.model.moe.narrow_rows import BlockRows, narrow_rows
from megatron_vpmoe.model.transformer_config import transformer_config
from megatron_vpmoe.runtime import expert_formats
from megatron_vpmoe.runtime.expert_formats import TORCHAO, check_format
from tests.conftest import fuzz_settings
from tests.tiny import tiny_config

pytest.importorskip("torchao", reason="torchao is not installed: make setup, or pip install torchao==0.18.0")
pytestmark = pytest.mark.usefixtures("single_process")

HIDDEN, FFN, EXPERTS = 64, 32, 8
FORMAT = pytest.mark.parametrize("name", FORMATS)
ROUNDED = 2**-4
"""e4m3 keeps four bits: half a unit of the last is at most so much of a number that is not near the format's least."""


def choice(tokens: int = 96, topk: int = 2, idle: int | None = 3) -> Tensor:
    """Skewed, with an expert that nobody chooses."""
    scores = torch.randn(tokens, EXPERTS, generator=torch.Generator().manual_seed(0)) + torch.arange(EXPERTS) / 4
    if idle is not None:
        scores[:, idle] = -99
    return scores.topk(topk).indices


def rows_of(name: str, chosen: Tensor) -> BlockRows:
    return narrow_rows(name, chosen, EXPERTS, hidden=HIDDEN, ffn=FFN)


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def experts_of(precision: str | None, *, biases: bool = True, activation: str = "squared_relu") -> StackedExperts:
    cfg = tiny_config(
        hidden_size=HIDDEN,
        moe_ffn_hidden_size=FFN,
        bf16=True,
        experts_precision=precision,
        add_bias_linear=biases,
        activation=activation,
    )
    experts = StackedExperts(EXPERTS, transformer_config(cfg), get_default_pg_collection())
    with torch.no_grad():
        for number, parameter in enumerate(experts.parameters()):
            parameter.copy_(draw(*parameter.shape, seed=10 + number) * (0.2 if parameter.ndim == 3 else 0.5))
    return experts.train()


def passed(experts: StackedExperts, chosen: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of one pass."""
    x = draw(len(chosen), HIDDEN, seed=1).to(experts.fc1_weight.dtype).requires_grad_()
    p = torch.rand(chosen.shape, generator=torch.Generator().manual_seed(2)).requires_grad_()
    out = experts.of_tokens(x, chosen, p)
    out.backward(draw(*out.shape, seed=3).to(out.dtype))
    found: dict[str, Any] = {"out": out.detach(), "x": x.grad, "p": p.grad}
    found |= {name: parameter.grad for name, parameter in experts.named_parameters()}
    return found


def distance(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want.double()).norm() / want.double().norm())


@pytest.mark.parametrize("activation", ["squared_relu", "swiglu"])
@FORMAT
def test_near_fp32_and_not_nearer_than_the_format_can_be(name: str, activation: str) -> None:
    """Output and gradients: as far from fp32 as two operands with four bits make it, and further than bf16 is."""
    chosen = choice()
    found = {precision: passed(experts_of(precision, activation=activation), chosen) for precision in (name, None)}
    want = passed(experts_of(None, activation=activation).float(), chosen)
    for what, exact in want.items():
        narrow, wide = (distance(found[precision][what], exact) for precision in (name, None))
        assert narrow < 0.1, (what, narrow)
        if what != "fc2_bias":  # whose gradient is a sum of the router's weights: in no product
            assert narrow > 2 * wide, (what, narrow, wide)
    assert not found[name]["fc1_weight"][3].any() and not found[name]["fc2_weight"][3].any(), "nobody chose expert 3"


@FORMAT
def test_operands_are_numbers_of_the_format(name: str) -> None:
    """A product with the identity gives back each operand, rounded: numbers of e4m3 times powers of two."""
    chosen = choice()
    rows = rows_of(name, chosen)
    x, real = rows.gather(draw(len(chosen), HIDDEN, seed=4)), rows.place_TK.flatten()
    want, width = x[real].float(), 32 if name == "mxfp8" else HIDDEN
    least = want.unflatten(1, (-1, width)).abs().amax(-1, keepdim=True).mul(2**-14).expand(-1, -1, width).flatten(1)
    identity = torch.eye(HIDDEN).bfloat16().expand(EXPERTS, HIDDEN, HIDDEN).contiguous()
    for told in (rows.linear(x, identity, None)[real].float(), rows.linear_transposed(x, identity)[real].float()):
        mantissa = torch.frexp(told).mantissa
        assert torch.equal(mantissa * 16, (mantissa * 16).round()), "no more than four bits"
        assert bool(((told - want).abs() <= ROUNDED * want.abs() + least).all())
        assert (told != want).float().mean() > 0.5


@FORMAT
def test_each_product_is_that_of_rounded_operands(name: str) -> None:
    """By the definition, in fp64, expert by expert: scales along the sum, of an expert's own rows for its gradient."""
    chosen = choice()
    rows = rows_of(name, chosen)
    real, expert = rows.place_TK.flatten(), chosen.flatten()
    x, g = rows.gather(draw(len(chosen), HIDDEN, seed=5)), rows.gather(draw(len(chosen), FFN, seed=6))
    g = (g * rows.spread(torch.rand(chosen.shape))).bfloat16()
    weight = draw(EXPERTS, FFN, HIDDEN, seed=7)
    forward, of_input = rows.linear(x, weight, None)[real], rows.linear_transposed(g, weight)[real]
    of_weight = rows.outer(g, x)
    exact: dict[str, Any] = {"rtol": 8e-3, "atol": 1e-2}  # products come back in bf16
    for e in set(expert.tolist()):
        mine, wide = real[expert == e], weight[e].double()
        want = rounded(name, x[mine], 1) @ rounded(name, wide, 1).T
        torch.testing.assert_close(forward[expert == e].double(), want, **exact)
        want = rounded(name, g[mine], 1) @ rounded(name, wide, 0)
        torch.testing.assert_close(of_input[expert == e].double(), want, **exact)
        ends = int(rows._ends_E[e - 1]) if e else 0, int(rows._ends_E[e])
        want = rounded(name, g[slice(*ends)], 0).T @ rounded(name, x[slice(*ends)], 0)
        torch.testing.assert_close(of_weight[e].double(), want, **exact)


def rounded(name: str, x: Tensor, along: int) -> Tensor:
    """In e4m3 with one power of two for all values along a dimension, or for each 32: by the definitions, in fp64."""
    x = x.double().movedim(along, -1)
    parts = x.unflatten(-1, (-1, 32)) if name == "mxfp8" else x.unsqueeze(-2)
    highest = parts.abs().amax(-1, keepdim=True).clamp(min=1e-12)
    exponent = (highest / 448).log2().ceil()  # the least power of two with which the highest is within the format
    narrow = (parts / exponent.exp2()).float().to(torch.float8_e4m3fn).double() * exponent.exp2()
    return narrow.flatten(-2).movedim(-1, along)


@fuzz_settings(60)
@given(st.integers(1, 70), st.integers(1, 3), st.booleans(), st.integers(0, 2**16))
def test_places(tokens: int, topk: int, in_order: bool, seed: int) -> None:
    """For any choice: every row has a place of its own in a block of its expert; the rest repeats its expert's rows."""
    wanted = FORMATS["fp8_rowwise"]
    chosen = torch.rand(tokens, 5, generator=torch.Generator().manual_seed(seed)).topk(topk).indices
    if in_order:
        chosen = chosen[:, :1].sort(0).values
    rows = BlockRows(chosen, 5, wanted, in_order=in_order)
    assert rows.token_P is not None
    assert len(rows.token_P) == wanted.places(chosen.numel(), 5)
    places, ends = rows.place_TK.flatten(), rows._ends_E
    assert len(set(places.tolist())) == chosen.numel() and int(ends[-1]) <= len(rows.token_P)
    sizes = ends.diff(prepend=torch.zeros(1, dtype=ends.dtype))
    assert bool((sizes > 0).all()) and not (sizes % wanted.rows).any()
    assert torch.equal(torch.searchsorted(ends, places.int(), right=True), chosen.flatten())
    assert torch.equal(rows.token_P[places], torch.arange(len(chosen)).repeat_interleave(chosen.shape[1]))
    owner = torch.searchsorted(ends, torch.arange(int(ends[-1]), dtype=torch.int32), right=True)
    repeats = (chosen[rows.token_P[: len(owner)]] == owner[:, None]).any(1)
    assert bool((repeats | ~torch.isin(owner, chosen)).all())
    p = torch.rand(chosen.shape)
    assert float(rows.spread(p).sum()) == pytest.approx(float(p.sum())) and torch.equal(
        rows.collect(rows.spread(p).flatten()), p
    )
    counted = rows.total(rows.spread(torch.ones(chosen.shape)).expand(-1, 4).contiguous())[:, 0]
    assert torch.equal(counted, torch.bincount(chosen.flatten(), minlength=5).float())


@FORMAT
def test_padding_changes_nothing(name: str) -> None:
    """Rows whose number fills no block give the products of the same rows beside others: the scales are their own."""
    chosen = choice(40)
    whole, parts = passed(experts_of(name), chosen), [passed(experts_of(name), chosen)]
    assert all(torch.equal(whole[key], parts[0][key]) for key in whole), "a second pass has the same bits"
    alone = rows_of(name, chosen)
    x, weight = draw(len(chosen), HIDDEN, seed=8), draw(EXPERTS, FFN, HIDDEN, seed=9)
    told = alone.linear(alone.gather(x), weight, None)[alone.place_TK.flatten()]
    more = torch.cat([chosen, choice(56)])
    beside = rows_of(name, more)
    other = beside.linear(beside.gather(torch.cat([x, draw(56, HIDDEN, seed=99)])), weight, None)
    torch.testing.assert_close(other[beside.place_TK[:40].flatten()], told, rtol=8e-3, atol=1e-3)


@FORMAT
def test_dispatched_rows(name: str) -> None:
    """Sorted rows of upstream's dispatchers, of one expert each, are the same products."""
    experts, counts = experts_of(name), torch.tensor([5, 0, 17, 1, 0, 33, 2, 9])
    x, p = draw(int(counts.sum()), HIDDEN, seed=1), torch.rand(int(counts.sum()))
    mixed = torch.randperm(len(x), generator=torch.Generator().manual_seed(7))
    chosen = torch.repeat_interleave(counts)[mixed].unsqueeze(1)
    together = experts.of_tokens(x[mixed], chosen, p[mixed].unsqueeze(1))
    torch.testing.assert_close(together, experts(x, counts, p)[0][mixed], rtol=8e-3, atol=1e-3)


def test_sampling_and_evaluation_take_the_plain_weights() -> None:
    plain, narrow, chosen = experts_of(None).eval(), experts_of("mxfp8").eval(), choice()
    x, p = draw(len(chosen), HIDDEN, seed=1), torch.rand(chosen.shape)
    assert torch.equal(plain.of_tokens(x, chosen, p), narrow.of_tokens(x, chosen, p))
    assert narrow.train().of_tokens(x, chosen, p).ne(plain.of_tokens(x, chosen, p)).any()
    assert narrow.state_dict().keys() == plain.state_dict().keys()


def stand_ins() -> SimpleNamespace:
    """torchao's kernels of fp8_rowwise by their documented contracts: shapes, strides, scales; nothing asked for."""

    def cast(x: Tensor, along: int) -> tuple[Tensor, Tensor]:
        scale = (448 / x.abs().float().amax(along, keepdim=True).clamp(min=1e-12)).log2().floor().exp2()
        return (x.float() * scale).to(torch.float8_e4m3fn), scale

    def column_major(x: Tensor) -> Tensor:
        return x.transpose(-2, -1).contiguous().transpose(-2, -1)

    def by_row(x: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
        assert x.stride(-1) == 1 and x.shape[1] % 16 == 0 and dtype == torch.float8_e4m3fn and power_of_two
        return cast(x, -1)  # [M, K], [M, 1]

    def by_column(x_EKN: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
        assert x_EKN.stride(-2) == 1 and not any(width % 16 for width in x_EKN.shape[1:])
        data, scale = cast(x_EKN, -2)
        return column_major(data), scale  # [E, K, N], [E, 1, N]

    def transposed(x_EKN: Tensor, dtype: torch.dtype, power_of_two: bool) -> tuple[Tensor, Tensor]:
        assert x_EKN.stride(-2) == 1
        data, scale = cast(x_EKN, -1)
        return column_major(data.transpose(1, 2)), scale.squeeze(-1)  # [E, N, K], [E, K]

    def by_expert(
        one: Tensor, other: Tensor, ends: Tensor, dtype: torch.dtype, power_of_two: bool
    ) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        expert = torch.searchsorted(ends, torch.arange(len(one), device=one.device, dtype=ends.dtype), right=True)
        for x in (one, other):
            of_x = expert[:, None].expand(-1, x.shape[1])
            amax = x.new_zeros(len(ends) + 1, x.shape[1], dtype=torch.float32)
            amax.scatter_reduce_(0, of_x, x.abs().float(), "amax")
            scale = (448 / amax.clamp(min=1e-12)).log2().floor().exp2()
            data = (x.float() * scale.index_select(0, expert)).to(torch.float8_e4m3fn)
            found += [column_major(data), scale[:-1].flatten()]  # [M, W] column-major, [E W]
        return tuple(found)

    return SimpleNamespace(by_row=by_row, by_column=by_column, transposed=transposed, by_expert=by_expert)


def scaled_product(
    left: Tensor, right: Tensor, of_left: Tensor, of_right: Tensor, offs: Tensor, *, out_dtype: torch.dtype, **_: bool
) -> Tensor:
    """torch's product of a card, by its contract: left row-major, right column-major, decoding scales in fp32."""
    assert left.stride(-1) == 1 and right.stride(-2) == 1 and left.dtype == right.dtype == torch.float8_e4m3fn
    wide_left, wide_right = left.float(), right.float()
    if right.ndim == 3:
        assert of_left.shape == left.shape[:1] and of_right.shape == (len(offs), right.shape[2])
        wide_left, wide_right = wide_left * of_left[:, None], wide_right * of_right[:, None]
    else:
        expert = torch.searchsorted(offs, torch.arange(left.shape[1], device=offs.device, dtype=offs.dtype), right=True)
        expert = expert.clamp(max=len(offs) - 1)
        wide_left = wide_left * of_left.view(len(offs), -1).index_select(0, expert).t()
        wide_right = wide_right * of_right.view(len(offs), -1).index_select(0, expert)
    assert out_dtype == torch.bfloat16
    return functional.grouped_mm(wide_left.bfloat16(), wide_right.bfloat16(), offs=offs)


def take_a_card(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(narrow_module, "_of_torchao", stand_ins)
    patch.setattr(BlockRows, "on_card", True)


def test_the_way_of_a_card_equals_the_emulation(monkeypatch: pytest.MonkeyPatch) -> None:
    """With kernels that keep torchao's and torch's contracts: scales and layouts reach the right product."""
    chosen = choice()
    emulated = passed(experts_of("fp8_rowwise"), chosen)
    take_a_card(monkeypatch)
    monkeypatch.setattr(torch, "_scaled_grouped_mm", scaled_product)
    found = passed(experts_of("fp8_rowwise"), chosen)
    for what, want in emulated.items():
        assert distance(found[what], want) < 4e-3, what


def test_a_pass_asks_the_device_for_nothing() -> None:
    """On fake tensors, by the way of a card, where torch's product checks dtypes, strides and scales; the emulated
    converters of mxfp8 likewise."""
    chosen = choice()
    for name in FORMATS:
        with FakeTensorMode(), pytest.MonkeyPatch.context() as patch:
            # As on a GPU, whatever this CPU has: torch knows shapes of grouped products in bf16 alone.
            patch.setattr(expert_rows, "_multiplies_bf16", lambda: True)
            if name == "fp8_rowwise":
                take_a_card(patch)
            experts = experts_of(name)
            x = torch.empty(len(chosen), HIDDEN, dtype=torch.bfloat16, requires_grad=True)
            p = torch.empty(chosen.shape, requires_grad=True)
            experts.of_tokens(x, torch.empty(chosen.shape, dtype=torch.int64), p).sum().backward()
            assert x.grad is not None and x.grad.shape == x.shape and p.grad is not None


def installed(patch: pytest.MonkeyPatch, **versions: str | None) -> None:
    found: dict[str, str | None] = {"torchao": TORCHAO, **dict.fromkeys(FORMATS["mxfp8"].packages, "1.0")}
    found |= {name.replace("_", "-"): version for name, version in versions.items()}
    patch.setattr(expert_formats, "_version", found.get)
    check_format.cache_clear()


def test_what_a_machine_lacks_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    hopper, blackwell, ampere = (9, 0), (10, 0), (8, 0)
    installed(monkeypatch)
    check_format("fp8_rowwise", 1024, 128, hopper)
    check_format("mxfp8", 1024, 128, blackwell)
    check_format("mxfp8", 1024, 32, None)
    for name, capability, told in (
        ("mxfp8", hopper, r"10\.0, and this one's is 9\.0(.|\n)*fp8_rowwise or null"),
        ("fp8_rowwise", blackwell, r"9\.0, and this one's is 10\.0(.|\n)*mxfp8 or null"),
        ("fp8_rowwise", ampere, r"this one's is 8\.0; nothing is emulated on a GPU"),
    ):
        with pytest.raises(DeviceError, match=told):
            check_format(name, 1024, 128, capability)
    with pytest.raises(DeviceError, match="multiples of 128, not 1024 and 32"):
        check_format("mxfp8", 1024, 32, blackwell)
    for capability in (hopper, None):
        for version, told in (("0.17.0", "0.17.0 is here"), (None, "none is here")):
            installed(monkeypatch, torchao=version)
            with pytest.raises(DeviceError, match=rf"wants torchao {TORCHAO}, and {told}"):
                check_format("fp8_rowwise", 1024, 128, capability)
    installed(monkeypatch, nvidia_cutlass_dsl=None)
    check_format("fp8_rowwise", 1024, 128, hopper)
    with pytest.raises(DeviceError, match="want nvidia-cutlass-dsl, and none is here"):
        check_format("mxfp8", 1024, 128, blackwell)
    check_format.cache_clear()


def test_a_training_pass_is_refused_as_the_run_is(monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torchao=None)
    experts, chosen = experts_of("mxfp8"), choice()
    x, p = draw(len(chosen), HIDDEN, seed=1), torch.rand(chosen.shape)
    with pytest.raises(DeviceError, match="torchao"):
        experts.of_tokens(x, chosen, p)
    experts.eval().of_tokens(x, chosen, p)
    check_format.cache_clear()


def test_what_is_checked_is_what_is_pinned(repository: Path) -> None:
    """On a GPU machine, and for the tests; where both files name a package, they name one version."""
    gpu, lock = (
        dict(
            line.split("==")
            for line in (repository / "requirements" / name).read_text().splitlines()
            if line[:1].isalpha()
        )
        for name in ("gpu.txt", "lock.txt")
    )
    assert gpu["torchao"] == lock["torchao"] == TORCHAO
    assert set(FORMATS["mxfp8"].packages) | set(FORMATS["fp8_rowwise"].packages) <= gpu.keys()
    assert all(lock[package] == gpu[package] for package in gpu.keys() & lock.keys())


def test_places_are_few_enough_and_estimated(repository: Path) -> None:
    """At full scale: 16,384 tokens of 4 of 256 experts."""
    full, kept = repository / "configs" / "vpmoe_stage1.yaml", ["--recompute-granularity", "null"]
    plain = memory_estimate(load_config(full, kept)).parts["activations"]
    for name, most in (("fp8_rowwise", 1.07), ("mxfp8", 1.5)):
        assert FORMATS[name].places(65_536, 256) <= most * 65_536
        more = memory_estimate(load_config(full, [*kept, "--experts-precision", name])).parts["activations"] - plain
        a_row = 2 * (2 * 1024 + 3 * 128)  # bytes that each of 79 layers keeps for one
        assert 0.8 < more / ((most - 1) * 65_536 * a_row * 79) <= 1
