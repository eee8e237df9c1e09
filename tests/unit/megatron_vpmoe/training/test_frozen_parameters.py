"""Steps under ``train_only``: what is frozen keeps its bits, what is trained has the gradients that it always had."""

from __future__ import annotations

import fnmatch

import pytest
import torch

from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.optim import assignment_table, build_optimizer
from megatron_vpmoe.training.step import train_step
from tests.tiny import TINY, random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
BATCH = (4, TINY["seq_length"], TINY["padded_vocab_size"])


class Training:
    def __init__(self, patterns: list[str] | None, **changes: object) -> None:
        self.cfg = tiny_config(train_only=patterns, clip_grad=0.0, **changes)
        self.model = build_model(self.cfg)
        self.wrapped = wrap_for_training(self.model, self.cfg)
        self.optimizer = build_optimizer([self.wrapped], self.cfg)
        self.objective = build_objective(self.cfg)

    def step(self, seed: int = 0) -> None:
        assert train_step(self.wrapped, self.optimizer, self.objective, [random_batch(*BATCH, seed=seed)]).updated

    def state(self) -> dict[str, torch.Tensor]:
        biases = {name: buffer.clone() for name, buffer in self.model.named_buffers() if name.endswith("expert_bias")}
        return {**{name: p.detach().clone() for name, p in self.model.named_parameters()}, **biases}

    def gradients(self) -> dict[str, torch.Tensor]:
        found = {name: getattr(p, "main_grad", None) for name, p in self.model.named_parameters()}
        return {name: gradient.clone() for name, gradient in found.items() if gradient is not None}


@pytest.mark.parametrize(
    "patterns",
    [
        ["embedding.word_embeddings.weight", "output_layer.weight"],
        ["*.mlp.router.weight", "*.mlp.experts.*"],
        ["decoder.layers.2.*"],
        ["*layernorm.weight", "*.sink", "*.value_residual_scale", "*.linear_fc1.bias", "*.fc2_bias", "*.qkv_bias"],
    ],
)
@pytest.mark.parametrize("changes", [{}, {"recompute_granularity": "full"}])
def test_only_what_is_named_moves(patterns: list[str], changes: dict[str, object]) -> None:
    training, whole = Training(patterns, **changes), Training(None, **changes)
    trained = {name for name, _ in training.model.named_parameters() for p in patterns if fnmatch.fnmatch(name, p)}
    whole.model.load_state_dict(training.model.state_dict())
    before = training.state()
    training.step()
    whole.step()
    gradients, expected = training.gradients(), whole.gradients()
    assert gradients.keys() == trained
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-5, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}")
    for seed in (1, 2):  # TPA's B factors and their like have a gradient from the second step on
        training.step(seed)
    moved = {name for name, tensor in training.state().items() if not torch.equal(tensor, before[name])}
    with_router = {n for n in before if n.endswith("expert_bias") and n.replace("expert_bias", "weight") in trained}
    assert moved == trained | with_router


def test_the_optimizer_knows_the_rest_as_frozen() -> None:
    training = Training(["*.mlp.experts.*"])
    training.step()
    rows = assignment_table(training.model, training.cfg)
    assert [row.name for row in rows] == [name for name, _ in training.model.named_parameters()]
    trained = {row.name for row in rows if row.optimizer != "frozen"}
    assert trained == {row.name for row in rows if ".mlp.experts." in row.name}
    assert {row.lr for row in rows if row.name not in trained} == {0.0}
    states = sum(len(member.state) for member in training.optimizer.members)
    assert states == len(trained)
