"""denoising: the mean squared error over supervised tokens however the batch is split, from draws that repeat."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.model.output import ModelOutput
from megatron_vpmoe.objectives import Denoising, build_objective
from megatron_vpmoe.runtime.counter import normal
from tests.tiny import NANO_MOE, random_batch, rows_of, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

DENOISER: dict[str, Any] = {
    **NANO_MOE,
    "num_layers": 2,
    "num_experts": None,
    "moe_shared_expert_intermediate_size": None,
    "num_query_groups": 4,
    "layer_type": "denoiser",
    "diffusion_levels": 20,
    "ddim_steps": 4,
    "objective": "denoising",
    "train_only": '["decoder.*"]',
    "sample_interval": None,
}


def denoiser() -> VPModel:
    model = build_model(tiny_config(**DENOISER))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.decoder.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model


def output_of(model: VPModel, batch: Batch) -> ModelOutput:
    output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    assert isinstance(output, ModelOutput)
    return output


def test_embeddings_are_standardised_over_the_table() -> None:
    every = denoiser().standardised(torch.arange(64).unsqueeze(0))[0]
    torch.testing.assert_close(every.mean(0), torch.zeros(32), atol=1e-5, rtol=0)
    torch.testing.assert_close(every.std(0, correction=0), torch.ones(32), atol=1e-5, rtol=0)


def test_any_split_sums_to_the_mean_over_supervised_tokens() -> None:
    model, batch = denoiser().train(), random_batch(4, 32, 64, seed=1)
    objective = build_objective(tiny_config(**DENOISER, seed=5))
    assert objective == Denoising(seed=5)
    found = []
    for cuts in ([0, 4], [0, 1, 3, 4]):
        parts = [rows_of(batch, *cut) for cut in pairwise(cuts)]
        totals = {key: float(value) for key, value in objective.counts(parts).items()}
        assert totals == {"tokens/supervised": int(batch.loss_mask.sum())} == objective.summary(totals)
        results = [objective(output_of(model, part), part, totals) for part in parts]
        loss = torch.stack([result.loss for result in results]).sum()
        assert sum(float(result.metrics["loss/total"]) for result in results) == pytest.approx(loss.item(), rel=1e-5)
        found.append((loss, torch.autograd.grad(loss, list(model.decoder.parameters()))))
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-6)


def test_unsupervised_tokens_do_not_count_and_an_empty_batch_has_a_zero_loss_with_a_gradient() -> None:
    model, batch = denoiser().train(), random_batch(1, 32, 64, seed=1)
    batch.loss_mask[:, 5:] = False
    other = replace(batch, labels=batch.labels.where(batch.loss_mask, (batch.labels + 1) % 64))
    objective, totals = Denoising(), {"tokens/supervised": 3.0}
    results = [objective(output_of(model, each), each, totals).loss for each in (batch, other)]
    assert results[0] == results[1] > 0
    batch.loss_mask.zero_()
    nothing = objective(output_of(model, batch), batch, {"tokens/supervised": 0.0}).loss
    nothing.backward()
    assert nothing.item() == 0 and not any(p.grad.any() for p in model.decoder.parameters() if p.grad is not None)


def test_validation_repeats_and_measures_what_ddim_finds() -> None:
    model, batch = denoiser().eval(), random_batch(2, 32, 64, seed=1)
    objective, totals = Denoising(seed=1), {"tokens/supervised": float(batch.loss_mask.sum())}
    with torch.no_grad():
        first, second = (objective(output_of(model, batch), batch, totals) for _ in range(2))
        estimate = model.decoder(
            model.standardised(batch.tokens),
            SequenceLayout(batch.document_id, batch.position_ids),
            noise_key_BS=objective.noise_keys(batch, training=False),
        )
    assert first.metrics == second.metrics and set(first.metrics) == {"loss/total", "denoised/error"}
    error = (estimate - model.standardised(batch.labels)).square().mean(-1)[batch.loss_mask].mean()
    assert first.metrics["denoised/error"].item() == pytest.approx(error.item(), rel=1e-4)
    with torch.no_grad():
        model.train()
        training = objective(output_of(model, batch), batch, totals)
    assert set(training.metrics) == {"loss/total"} and training.loss != first.loss


def test_draws_hang_on_sample_document_and_position_alone() -> None:
    batch = random_batch(3, 32, 64, seed=1)
    keys = Denoising(seed=1).noise_keys(batch, training=True)
    assert torch.equal(Denoising(seed=1).noise_keys(rows_of(batch, 1, 2), training=True), keys[1:2])
    real = keys[batch.document_id >= 0]
    assert len(real.unique()) == len(real)
    for other in (
        Denoising(seed=2).noise_keys(batch, training=True),
        Denoising(seed=1).noise_keys(batch, training=False),
        Denoising(seed=1).noise_keys(replace(batch, sample_ids=[5, 6, 7]), training=True),
    ):
        assert not (other == keys).any()
    assert normal(keys, 4).shape == (3, 32, 4)


def test_it_writes_no_text() -> None:
    model, batch = denoiser(), random_batch(1, 32, 64, seed=1)
    output = output_of(model, batch)
    readings = [output.logits, lambda: output.cross_entropy(batch.labels, batch.loss_mask, torch.ones(1, 32))]
    for cached in (True, False):
        asked = [Prompt([1, 2, 3])], SamplingOptions(4, (5,))
        readings.append(lambda cached=cached, asked=asked: generate(model, *asked, cached=cached))
    for reading in readings:
        with pytest.raises(ConfigError, match="no distribution over tokens"):
            reading()
