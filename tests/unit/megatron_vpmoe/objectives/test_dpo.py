"""dpo: the definition in fp64, value and gradient, for every variant, however the global batch is split."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest
import torch
from plain_output import VOCAB, logits_for, logits_output, waits_of
from torch import Tensor
from torch.nn.functional import logsigmoid

from megatron_vpmoe.annotation import REFERENCE_LOG_P
from megatron_vpmoe.data.batch import Batch, Document, assemble
from megatron_vpmoe.errors import ConfigError, DataError
from megatron_vpmoe.objectives import DPO, build_objective
from tests.tiny import tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
ROWS = (4, 2, 0, 6)
"""Documents of each row; one row is padding."""


def answer(length: int, seed: int) -> Document:
    random = np.random.default_rng(seed)
    span = np.zeros(length, np.uint8)
    span[length // 2 : length - 1] = 2
    log_p = np.where(span > 0, -random.random(length) * 4, 0).astype(np.float32)
    tokens = random.integers(2, VOCAB, length).astype(np.int32)
    return Document(tokens, (span > 0).astype(np.uint8), span, annotations={REFERENCE_LOG_P.name: log_p})


def pairs(rows: tuple[int, ...] = ROWS) -> Batch:
    documents = [[answer(4 + (3 * row + n) % 6, 10 * row + n) for n in range(count)] for row, count in enumerate(rows)]
    ids = list(range(len(rows)))
    return assemble(documents, seq_length=50, eod_id=1, sample_ids=ids, annotations=[REFERENCE_LOG_P])


def part_of(batch: Batch, begin: int, end: int) -> Batch:
    core = {name: value[begin:end] for name, value in vars(batch).items() if name != "annotations"}
    return Batch(**core, annotations={name: value[begin:end] for name, value in batch.annotations.items()})


def by_definition(objective: DPO, logits_BSV: Tensor, batch: Batch) -> dict[str, Tensor]:
    log_p = logits_BSV.log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1)
    reference = batch.annotations[REFERENCE_LOG_P.name].double()
    found: list[dict[str, Tensor]] = []
    for row, count in enumerate(ROWS):
        for pair in range(count // 2):
            sides = [batch.loss_mask[row] & (batch.document_id[row] == 2 * pair + side) for side in (0, 1)]
            deltas, alone = [], []
            for mask in sides:
                divisor = mask.sum() if objective.length_normalised else 1
                deltas.append((log_p[row] - reference[row])[mask].sum() / divisor)
                alone.append(log_p[row][mask].sum() / divisor)
            margin = deltas[0] - deltas[1]
            if objective.loss == "sigmoid":
                at = lambda m: -logsigmoid(objective.beta * m)  # noqa: E731
            else:
                at = lambda m: (m - 1 / (2 * objective.beta)) ** 2  # noqa: E731
            e = objective.label_smoothing
            found.append(
                {
                    "loss/total": (1 - e) * at(margin) + e * at(-margin),
                    "rewards/chosen": objective.beta * deltas[0],
                    "rewards/rejected": objective.beta * deltas[1],
                    "rewards/margin": objective.beta * margin,
                    "accuracy/relative": (deltas[0] > deltas[1]).double(),
                    "accuracy/policy": (alone[0] > alone[1]).double(),
                    "log_p/chosen": alone[0],
                    "log_p/rejected": alone[1],
                }
            )
    means = {name: torch.stack([each[name] for each in found]).mean() for name in found[0]}
    log_r = (log_p - reference)[batch.loss_mask]
    means["loss/chosen"] = -log_p[batch.loss_mask & (batch.document_id % 2 == 0)].mean()
    means["loss/total"] = means["loss/total"] + objective.chosen_weight * means["loss/chosen"]
    return {**means, "kl/reference": (log_r.exp() - 1 - log_r).mean()}


VARIANTS = [DPO(0.3, *how) for how in product((0.0, 0.2), ("sigmoid", "ipo"), (False, True))]
VARIANTS.append(DPO(0.3, chosen_weight=0.7))


@pytest.mark.parametrize("objective", VARIANTS, ids=str)
@pytest.mark.parametrize("cuts", [[0, 4], [0, 3, 4], [0, 1, 2, 3, 4]])
def test_any_split_sums_to_the_definition(objective: DPO, cuts: list[int]) -> None:
    batch = pairs()
    logits = logits_for(batch)
    expected = by_definition(objective, logits, batch)
    parts = [part_of(batch, begin, end) for begin, end in pairwise(cuts)]
    totals = {key: float(value) for key, value in objective.counts(parts).items()}
    assert totals["pairs"] == sum(ROWS) / 2
    assert totals["tokens/chosen"] + totals["tokens/rejected"] == int(batch.loss_mask.sum())
    assert objective.summary(totals) == totals
    results = [
        objective(logits_output(logits[begin:end]), part, totals)
        for part, (begin, end) in zip(parts, pairwise(cuts), strict=True)
    ]
    loss = torch.stack([result.loss for result in results]).sum()
    torch.testing.assert_close(loss.double(), expected["loss/total"], rtol=1e-5, atol=1e-6)
    (gradient,) = torch.autograd.grad(loss, logits)
    (due,) = torch.autograd.grad(expected["loss/total"], logits)
    torch.testing.assert_close(gradient, due, rtol=1e-4, atol=1e-6)
    assert due.abs().max() > 1e-3 and not gradient[2].any()
    assert results[0].metrics.keys() == expected.keys()
    for name, value in expected.items():
        found = sum(float(result.metrics[name]) for result in results)
        assert found == pytest.approx(value.item(), rel=1e-5, abs=1e-6), name
        assert not results[0].metrics[name].requires_grad


def test_the_reference_itself_is_nowhere() -> None:
    batch, objective = pairs(), DPO(0.1)
    logits = logits_for(batch).float()
    log_p = logits.log_softmax(-1).gather(-1, batch.labels.unsqueeze(-1)).squeeze(-1).detach()
    batch.annotations[REFERENCE_LOG_P.name] = torch.where(batch.loss_mask, log_p, 0.0)
    totals = {key: float(value) for key, value in objective.counts([batch]).items()}
    metrics = objective(logits_output(logits), batch, totals).metrics
    assert float(metrics["loss/total"]) == pytest.approx(np.log(2), rel=1e-5)
    assert all(abs(float(metrics[name])) < 1e-5 for name in ("rewards/margin", "rewards/chosen", "kl/reference"))


def test_a_batch_of_padding_has_a_zero_loss_with_a_gradient() -> None:
    batch, objective = pairs((0, 0)), DPO(0.1)
    logits, totals = logits_for(batch), {key: float(value) for key, value in objective.counts([batch]).items()}
    assert set(totals.values()) == {0.0}
    result = objective(logits_output(logits), batch, totals)
    result.loss.backward()
    assert result.loss.item() == 0.0 and logits.grad is not None and not logits.grad.any()


@pytest.mark.parametrize("fault", ["odd", "silent"])
def test_documents_that_are_no_pairs_are_refused(fault: str) -> None:
    batch = pairs((2, 3)) if fault == "odd" else pairs((2, 4))
    if fault == "silent":
        batch.loss_mask[1] &= batch.document_id[1] != 2
    with pytest.raises(DataError, match="without its partner"):
        DPO(0.1).counts([batch])


def test_settings_and_their_bounds() -> None:
    fields = {"dpo_beta": 0.5, "dpo_label_smoothing": 0.1, "dpo_loss": "ipo", "dpo_length_normalised": True}
    fields["dpo_chosen_weight"] = 0.7
    assert build_objective(tiny_config(objective="dpo", **fields)) == DPO(0.5, 0.1, "ipo", True, 0.7)
    assert build_objective(tiny_config(objective="dpo")) == DPO(0.1)
    for name, value in [
        ("dpo_beta", 0.0),
        ("dpo_beta", -1.0),
        ("dpo_beta", "nan"),
        ("dpo_beta", 1e3),
        ("dpo_label_smoothing", 0.5),
        ("dpo_label_smoothing", -0.1),
        ("dpo_loss", "hinge"),
    ]:
        with pytest.raises(ConfigError, match=name.replace("_", "[_-]")):
            tiny_config(objective="dpo", **{name: value})


def test_a_gpu_is_not_waited_for() -> None:
    assert waits_of(VARIANTS[0], pairs()) == []
