"""Weights as int8: what is decoded is near what the model says, step by step as in a whole pass; refusals."""

from __future__ import annotations

import copy

import pytest
import torch

from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.int8 import narrow_to_int8
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.gpt import VPModel
from tests.unit.megatron_vpmoe.think.test_think_experts import lively

pytestmark = pytest.mark.usefixtures("single_process")
TEXT = torch.tensor([[5, 9, 3, 60, 1, 33, 33, 8, 21, 2]])
LINEARS = {"state_space": 2 * 4, "mixture": 4 + 2 * 4 + 2 * 4 + (2 * 4 + 1)}


def logits_of(model: VPModel) -> torch.Tensor:
    layout = SequenceLayout(torch.zeros_like(TEXT, dtype=torch.int32), torch.arange(TEXT.shape[1])[None])
    with torch.no_grad():
        return model(TEXT, layout).logits()[0]


@pytest.mark.parametrize("name", LINEARS)
def test_it_is_near_the_model_and_decodes_as_it_computes(name: str) -> None:
    model = lively(name).float()
    expected = logits_of(model)
    table = model.embedding.word_embeddings.weight
    kept = {"table": table, **(dict(model.decoder.adapters.named_parameters()) if name == "mixture" else {})}
    before = copy.deepcopy(kept)
    told = narrow_to_int8(model)
    assert told.layers == LINEARS[name] and told.after < told.before - 3 * told.layers
    found = logits_of(model)
    assert 0 < (found - expected).norm() < 0.03 * expected.norm()
    assert all(torch.equal(tensor, before[of]) for of, tensor in kept.items())
    options = SamplingOptions(8, ())
    prompts = [Prompt([5, 9, 3]), Prompt([11]), Prompt([60, 1, 33, 33])]
    cached, whole = generate(model, prompts, options), generate(model, prompts, options, cached=False)
    assert [one.ids for one in cached] == [one.ids for one in whole]
    for ours, theirs in zip(cached, whole, strict=True):
        torch.testing.assert_close(ours.untempered, theirs.untempered, rtol=1e-4, atol=1e-4)


def test_a_transformer_is_refused() -> None:
    with pytest.raises(ConfigError, match="reads its weights in layouts of oneDNN"):
        narrow_to_int8(lively("transformer").float())


def test_without_torchao_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"vpmoe\[narrow\]"):
        narrow_to_int8(lively("state_space").float())
