"""The sampler: a batch gives each prompt what it would get alone; draws come from the distribution asked for."""

from __future__ import annotations

import pytest
import torch

from megatron_vpmoe.errors import DataError
from megatron_vpmoe.generation.sampler import SamplingOptions, choose, generate
from megatron_vpmoe.model.attention import backends, self_attention
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from tests.tiny import tiny_config

PROMPTS = [[5, 9, 3], [7] * 17 + [2, 40], [11], [60, 1, 33, 33, 8, 21]]
STOP = 13


@pytest.fixture
def model(single_process: None) -> VPModel:
    torch.manual_seed(2)
    model = build_model(tiny_config())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter *= 5  # far enough from uniform that greedy tokens vary
    return model


def by_full_passes(model: VPModel, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding with no cache, no padding and no batch: one whole pass a token."""
    tokens = list(prompt)
    model.eval()
    while len(tokens) < len(prompt) + count and (tokens[-1] != STOP or len(tokens) == len(prompt)):
        layout = SequenceLayout(torch.zeros(1, len(tokens), dtype=torch.int32), torch.arange(len(tokens))[None])
        with torch.no_grad():
            tokens.append(int(model(torch.tensor([tokens]), layout).logits()[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_a_batch_gives_each_prompt_what_it_gets_alone(model: VPModel) -> None:
    together = generate(model, PROMPTS, SamplingOptions(24, (STOP,)))
    for prompt, completion in zip(PROMPTS, together, strict=True):
        assert completion == by_full_passes(model, prompt, 24)
    assert len({token for completion in together for token in completion}) > 4


def test_it_stops_at_the_stop_token(model: VPModel) -> None:
    free = generate(model, PROMPTS, SamplingOptions(12, ()))
    stop = free[0][5]
    stopped = generate(model, PROMPTS, SamplingOptions(12, (stop,)))
    assert stopped[0] == free[0][: free[0].index(stop) + 1]
    for one, other in zip(stopped, free, strict=True):
        assert one == other[: len(one)]


def test_training_mode_is_restored(model: VPModel) -> None:
    model.train()
    generate(model, [[1]], SamplingOptions(1, ()))
    assert model.training


def test_a_seed_repeats_its_draw(model: VPModel) -> None:
    draws = [generate(model, PROMPTS, SamplingOptions(8, (), temperature=2.0, seed=seed)) for seed in (1, 1, 2)]
    assert draws[0] == draws[1] != draws[2]


def test_temperature_and_nucleus() -> None:
    """Frequencies of many draws against the renormalised nucleus: of 0.5, 0.3, 0.15, 0.05 at 0.75 the first two."""
    probabilities = torch.tensor([0.05, 0.5, 0.15, 0.3])
    logits = probabilities.log().repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)
    nucleus = choose(logits, SamplingOptions(1, (), temperature=1.0, top_p=0.75), generator).bincount(minlength=4)
    torch.testing.assert_close(nucleus / 20_000, torch.tensor([0.0, 0.625, 0.0, 0.375]), rtol=0, atol=0.015)
    hot = choose(logits, SamplingOptions(1, (), temperature=2.0), generator).bincount(minlength=4)
    torch.testing.assert_close(hot / 20_000, probabilities.sqrt() / probabilities.sqrt().sum(), rtol=0, atol=0.015)
    assert choose(logits, SamplingOptions(1, ()), generator).unique().tolist() == [1]


@pytest.mark.parametrize("wrong", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_new_tokens": 0}])
def test_unusable_options(wrong: dict[str, float]) -> None:
    with pytest.raises(DataError, match="sampling options"):
        SamplingOptions(**{"max_new_tokens": 4, "stop_ids": (), **wrong})  # pyright: ignore[reportArgumentType]


def test_an_empty_prompt_is_refused(model: VPModel) -> None:
    with pytest.raises(DataError, match="empty prompt"):
        generate(model, [[1], []], SamplingOptions(4, ()))


def test_nothing_is_compiled_for_prompts(model: VPModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU whole sequences go by FlexAttention, which compiles for shapes; those of prompts are always new."""
    expected = generate(model, PROMPTS, SamplingOptions(6, (STOP,)))
    ran: list[int] = []

    def compiled(query: torch.Tensor, *_arguments: object) -> torch.Tensor:
        ran.append(query.shape[2])
        return torch.zeros_like(query)

    monkeypatch.setattr(self_attention, "select_backend", lambda *_, **__: "flex")
    monkeypatch.setattr(backends, "flex_attention", compiled)
    assert generate(model, PROMPTS, SamplingOptions(6, (STOP,))) == expected
    assert not ran
    by_full_passes(model, [1, 2, 3], 1)
    assert ran, "training and evaluation keep the fast kernel"
