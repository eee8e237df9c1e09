"""Compiled steps: the tokens and numbers of plain ones, in one graph for one row and one for several; refusals."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from megatron_vpmoe.errors import ConfigError, DeviceError
from megatron_vpmoe.generation.compiled_step import compile_step
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.int8 import narrow_to_int8
from megatron_vpmoe.generation.kv_cache import BLOCK
from megatron_vpmoe.generation.prompts import Completion, Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.model.gpt import VPModel
from tests.unit.megatron_vpmoe.think.test_think_experts import lively, reminded

pytestmark = pytest.mark.usefixtures("single_process", "nothing_compiled")
TEXTS = ([5, 9, 3], [7] * (BLOCK - 5) + [2, 40], [11], [60, 1, 33, 33, 8, 21])
PROMPTS = [Prompt(ids, max_new_tokens=new) for ids, new in zip(TEXTS, (9, 7, 3, 5), strict=True)]


def decoded(model: VPModel, *, routing: bool = False) -> list[Completion]:
    """Of more prompts than rows, which begin, leave and move, down to one row; one grows over a block of columns."""
    return generate(model, PROMPTS, SamplingOptions(9, ()), rows=3, record_routing=routing)


def close(ones: list[Completion], others: list[Completion]) -> None:
    assert [one.ids for one in ones] == [other.ids for other in others]
    for one, other in zip(ones, others, strict=True):
        torch.testing.assert_close(one.untempered, other.untempered, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_by_the_compilers_own_code() -> None:
    """Whole passes, which each token goes through with those before it, say the same."""
    model = lively("state_space").float()
    whole = generate(model, PROMPTS, SamplingOptions(9, ()), rows=3, cached=False)
    compile_step(model)
    close(decoded(model), whole)
    assert counters["stats"]["unique_graphs"] == 2 and not counters["graph_break"]


@pytest.mark.slow
def test_one_graph_a_kind_of_layer_for_one_row_and_one_for_several(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a mixture with a store and int8 weights. The graphs are taken in as ever, and run as they are."""
    compiler = torch.compile
    monkeypatch.setattr(torch, "compile", lambda method, **how: compiler(method, backend="aot_eager", **how))
    model = lively("mixture with store").float()
    model.recall = None
    reminded(model)  # of the embedding in fp32
    narrow_to_int8(model)
    plain = decoded(model)
    compile_step(model)
    for routing in (False, True):
        close(decoded(model, routing=routing), plain)
        assert counters["stats"]["unique_graphs"] == 2 * 3 and not counters["graph_break"]


def test_others_are_refused_and_so_is_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="no way is built to compile its decoding steps"):
        compile_step(lively("transformer").float())
    monkeypatch.setenv("CXX", "no-such-compiler")
    model = lively("state_space").float()
    with pytest.raises(DeviceError, match=r"no C\+\+ compiler 'no-such-compiler'(.|\n)*leave --compile out"):
        compile_step(model)
    assert not any(layer.compiled_step for layer in model.decoder.layers)
