"""The whole model against the slow one of ref/model.py, which shares no line with it: logits, loss and gradients."""

from __future__ import annotations

import pytest
import torch
from student_cases import STUDENTS, lively_model, student_of
from torch.nn import functional

from megatron_vpmoe.model.attention.masks import SequenceLayout
from ref.model import Weights, logits
from tests.tiny import random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")

# fp64 where the product has it: the experts' grouped product and RoPE's fixed frequencies are fp32.
PRECISION = {name: (torch.float64, 1e-10) for name in STUDENTS}
PRECISION["vpDense shape only"] = PRECISION["Qwen3"] = (torch.float64, 1e-5)
PRECISION["RoPE in windows, no biases, no QK-norm"] = (torch.float64, 1e-5)
PRECISION["vpMoE"] = (torch.float32, 1e-4)
PRECISION["softmax router, no groups, no shared expert, all layers sparse"] = (torch.float32, 1e-4)
PRECISION["Nano-MoE"] = PRECISION["gated experts with biases, two dense layers"] = (torch.float32, 1e-4)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("name", STUDENTS)
def test_logits_loss_and_gradients(name: str, backend: str) -> None:
    """Two packed rows with padding, in training mode: the balance loss is in the gradients."""
    dtype, tolerance = PRECISION[name]
    changes = {"moe_aux_loss_coeff": 0.1, **STUDENTS[name], "attention_backend": backend}
    model = lively_model(dtype, **changes).train()
    batch = random_batch(2, 40, 64, seed=1)
    output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
    ours = output.logits()
    loss = functional.cross_entropy(ours[batch.loss_mask], batch.labels[batch.loss_mask], reduction="sum")
    loss.backward()

    student, weights = student_of(tiny_config(**changes)), Weights(model.state_dict())
    expected_loss = torch.zeros((), dtype=torch.float64)
    for row in range(2):
        theirs, balance = logits(student, weights, batch.tokens[row].tolist(), batch.document_id[row].tolist())
        real = batch.document_id[row] >= 0
        torch.testing.assert_close(ours[row, real].double(), theirs[real], rtol=tolerance, atol=tolerance)
        mask = batch.loss_mask[row]
        cross_entropy = functional.cross_entropy(theirs[mask], batch.labels[row][mask], reduction="sum")
        expected_loss = expected_loss + cross_entropy + balance
        loss = loss + balance.detach()
    torch.testing.assert_close(loss.double(), expected_loss, rtol=tolerance, atol=tolerance)
    assert not weights.unread(), "the product has weights that no formula uses"
    expected_loss.backward()
    for parameter_name, parameter in model.named_parameters():
        theirs = weights.leaf[parameter_name].grad
        assert theirs is not None and parameter.grad is not None, parameter_name
        scale = theirs.abs().max().item()
        assert scale > 0, f"{parameter_name} takes no part"
        error = (parameter.grad.double() - theirs).abs().max().item()
        assert error <= 10 * tolerance * max(scale, 1.0), f"{parameter_name}: {error:.1e} of {scale:.1e}"
