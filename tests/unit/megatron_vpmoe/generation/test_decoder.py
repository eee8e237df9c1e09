"""A token a row through the cache gives the logits of the model's own forward pass over whole sequences."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_vpmoe.config import RunConfig, load_config
from megatron_vpmoe.generation import linear
from megatron_vpmoe.generation.attention import attended
from megatron_vpmoe.generation.decoder import Decoder
from megatron_vpmoe.generation.kv_cache import BLOCK
from megatron_vpmoe.generation.linear import Linear
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
LENGTH = 44  # past every window here, and past the ring's first turn
DESIGNS = ("stage1", "vpdense_8", "vpdense0_5_8", "qwen3", "qwen3_o200k")


class Counting(TorchDispatchMode):
    """Notes the name of every operation."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def lively(cfg: RunConfig) -> VPModel:
    """A model with every parameter moved off its initial value."""
    torch.manual_seed(0)
    model = build_model(cfg).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2).add_(0.1 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("expert_bias"):
                buffer.normal_(std=0.1)
    return model


def differences(model: VPModel, rows: int, *, begin: int = 0) -> torch.Tensor:
    """Largest difference at each position, relative to the largest logit; each row is a step behind the one before."""
    tokens = torch.randint(1, 64, (rows, LENGTH), generator=torch.Generator().manual_seed(1))
    layout = SequenceLayout(torch.zeros(rows, LENGTH, dtype=torch.int32), torch.arange(LENGTH).expand(rows, -1))
    decoder, found, row = Decoder(model), torch.full((rows, LENGTH), torch.inf), torch.arange(rows)
    cache, computed = decoder.cache(rows), {}
    with torch.no_grad():
        whole = model(tokens, layout, computed).logits()
        cache.reserve(begin)
        for number in range(rows if begin else 0):
            cache.fill(number, {n: (k[number, :, :begin], v[number, :, :begin]) for n, (k, v) in computed.items()})
        for step in range(begin, LENGTH + rows - 1):
            position = (step - row).clamp(begin, LENGTH - 1)
            longest = int(position.max()) + 1
            cache.reserve(longest)
            logits = decoder.step(tokens[row, position], position, cache, longest)
            assert logits is not None
            found[row, position] = (logits - whole[row, position].float()).abs().amax(-1)
    return found[:, begin:] / whole.abs().max().float()


@pytest.mark.parametrize("name", DESIGNS)
@pytest.mark.parametrize("rows", [1, 5])
def test_cached_logits_equal_uncached(repository: Path, name: str, rows: int) -> None:
    cfg = load_config(repository / "configs" / "nano" / f"{name}.yaml", ["--num-layers", "4"])
    if cfg.model.window_size is not None:
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"window_size": 16})})
    assert differences(lively(cfg).double(), rows).max() < 1e-5


MANY_EXPERTS: dict[str, Any] = {"num_experts": 64, "moe_router_group_topk": 2}


@pytest.mark.parametrize(
    "changes",
    [{}, MANY_EXPERTS, {"window_size": 1}, {"activation": "swiglu"}, {**MANY_EXPERTS, "activation": "swiglu"}],
)
@pytest.mark.parametrize("begin", [0, 3, 29])
def test_a_row_begins_with_a_computed_past(changes: dict[str, Any], begin: int) -> None:
    """Within the ring and past its end; few rows of many experts go by gathered experts."""
    assert differences(lively(tiny_config(**changes)).double(), 2, begin=begin).max() < 1e-5


def test_bf16() -> None:
    """On a model as it is initialised: a livelier one of this size sends tokens to other experts for a rounding."""
    assert differences(build_model(tiny_config(bf16=True)).eval(), 2).median() < 1e-2


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_attention_reads_keys_and_values_in_their_own_dtype(dtype: torch.dtype, tolerance: float) -> None:
    """On a GPU, of which this knows shapes and dtypes alone, no copy of them is made; on a CPU bf16 is widened."""
    query, key, value, bias = (torch.randn(size) for size in ((6, 2, 8), (6, 8, 33), (6, 33, 8), (6, 2, 33)))
    given = [x.to(dtype) for x in (query, key, value)]
    exact = [x.double() for x in given]
    expected = (exact[0] @ exact[1] * 0.3 + bias).softmax(-1) @ exact[2]
    found = attended(given[0], given[1], given[2], bias, 0.3)
    assert found.dtype == dtype and (found - expected).abs().max() < tolerance
    with FakeTensorMode(), Counting() as counted:
        q, k, v, b = (torch.empty(x.shape, dtype=x.dtype, device="cuda") for x in (*given, bias))
        counted.names.clear()
        assert attended(q, k, v, b, 0.3).dtype == dtype
    widened = [name for name in counted.names if "_to_copy" in name]
    assert len(widened) == (dtype == torch.bfloat16), "the probabilities alone are converted, and not in fp32"


@pytest.mark.parametrize("name", ["stage1", "qwen3"])
def test_packed_weights_give_the_same_logits(repository: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load_config(repository / "configs" / "nano" / f"{name}.yaml", ["--num-layers", "4"])
    torch.manual_seed(0)
    model, token = build_model(cfg).eval(), torch.tensor([5, 9])
    monkeypatch.setattr(linear, "_ONEDNN_FROM", 1)
    steps = []
    for dtype in (torch.float64, torch.float32):
        decoder = Decoder(model.to(dtype), packed=dtype == torch.float32)
        cache = decoder.cache(2)
        cache.reserve(1)
        with torch.no_grad():
            steps.append(decoder.step(token, torch.zeros_like(token), cache, 1))
    torch.testing.assert_close(steps[1], steps[0], rtol=1e-4, atol=1e-4)


def test_the_cache_takes_what_is_said_of_it() -> None:
    """Windows are rings; what no window bounds grows by blocks."""
    cache = Decoder(lively(tiny_config(window_size=8))).cache(3)
    one_column = 2 * 3 * 2 * 8 * 4  # keys and values, rows, groups, head dim, bytes of fp32
    for positions, blocks in ((5, 1), (BLOCK, 1), (BLOCK + 1, 2), (3, 2)):
        cache.reserve(positions)
        assert cache.nbytes == one_column * (3 * (1 + 8) + 1 + blocks * BLOCK)


def test_a_step_waits_for_nothing() -> None:
    """Counted on the CPU: no operation of a step hands a value to the host, which on a GPU would stop the launches."""
    decoder = Decoder(lively(tiny_config()))
    cache = decoder.cache(2)
    cache.reserve(4)
    with Counting() as counted, torch.no_grad():
        decoder.step(torch.tensor([1, 2]), torch.tensor([0, 3]), cache, 4)
    waiting = ("_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "repeat_interleave.Tensor")
    assert len(counted.names) > 100
    assert not [name for name in counted.names if any(word in name for word in waiting)]


def test_the_pass_over_prompts_goes_by_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    """The modules' large linears too, to the same keys and values."""
    monkeypatch.setattr(linear, "_ONEDNN_FROM", 1 << 9)
    model = build_model(tiny_config()).eval()
    tokens = torch.arange(1, 30)[None]
    layout, own = SequenceLayout(torch.zeros(1, 29, dtype=torch.int32), torch.arange(29)[None]), {}
    with torch.no_grad(), Counting() as counted:
        model(tokens, layout, own)
        before = sum("linear_pointwise" in name for name in counted.names)
        past = Decoder(model).past(tokens, layout)
    assert before == 0 < sum("linear_pointwise" in name for name in counted.names)
    assert len(past) == len(own) == 4
    for number in own:
        torch.testing.assert_close(past[number], own[number], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 7, 40])
@pytest.mark.parametrize("packed", [False, True])
def test_large_linears_are_linears(rows: int, packed: bool) -> None:
    """They go another way on a CPU, with and without a bias; in another layout where they are asked to."""
    x, weight, bias, hidden = (torch.randn(size) for size in ((rows, 512), (1100, 512), (1100,), (rows, 1100)))
    for given in (None, bias):
        large, expected = Linear(weight, given, packed=packed), functional.linear(x, weight, given)
        torch.testing.assert_close(large(x), expected, rtol=1e-4, atol=1e-4)
        sums = hidden.clone()
        large.add(sums, x)
        torch.testing.assert_close(sums, hidden + expected, rtol=1e-4, atol=1e-4)
