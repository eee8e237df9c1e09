"""mixture_ce: what is told of the router's weights is theirs over all supervised tokens, however the batch is split."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model
from megatron_vpmoe.objectives import build_objective
from tests.tiny import MIXTURE, random_batch, rows_of, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
KINDS = ("transformer", "state_space", "denoiser")


@pytest.mark.parametrize("spread", [0.3, 1e-3])
def test_means_and_deviations_of_the_weights(spread: float) -> None:
    """Also of weights that hardly differ, whose squares do so by less than fp32 tells apart."""
    torch.manual_seed(0)
    cfg = tiny_config(**MIXTURE)
    model, batch, objective = build_model(cfg).eval(), random_batch(4, 32, 64, seed=1), build_objective(cfg)
    with torch.no_grad():
        model.decoder.router.weight.normal_(std=spread)
        outputs = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    weight_NE = outputs.expert_weight_BSE[batch.loss_mask].double()
    std_E, mean_E = torch.std_mean(weight_NE, 0, correction=0)
    for cuts in ([0, 4], [0, 1, 3, 4]):
        parts = [rows_of(batch, *cut) for cut in pairwise(cuts)]
        totals = {key: float(value) for key, value in objective.counts(parts).items()}
        sums: dict[str, float] = {}
        for part in parts:
            with torch.no_grad():
                output = model(part.tokens, SequenceLayout(part.document_id, part.position_ids))
                for tag, value in objective(output, part, totals).metrics.items():
                    sums[tag] = sums.get(tag, 0.0) + float(value)
        told = objective.of_sums(sums)
        assert set(told) == {"loss/total", "loss/ce", "routing/entropy"} | {
            f"routing/{kind}{ending}" for kind in KINDS for ending in ("", "/std")
        }
        for kind, mean, std in zip(KINDS, mean_E.tolist(), std_E.tolist(), strict=True):
            assert told[f"routing/{kind}"] == pytest.approx(mean, rel=1e-6)
            assert told[f"routing/{kind}/std"] == pytest.approx(std, rel=1e-2, abs=1e-8) and std > 0
