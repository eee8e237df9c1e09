"""One step: what moves when the numbers are sound, and that nothing does when they are not."""

from __future__ import annotations

import gc
import math
import signal
import weakref

import pytest
import torch

from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.model.moe.router import VPMoERouter
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.optim import build_optimizer
from megatron_vpmoe.runtime.signals import Interrupted, StopRequest
from megatron_vpmoe.training.evaluate import evaluate
from megatron_vpmoe.training.step import train_step
from tests.tiny import TINY, random_batch, tiny_config

pytestmark = pytest.mark.usefixtures("single_process")
BATCH = (4, TINY["seq_length"], TINY["padded_vocab_size"])


class Setup:
    def __init__(self, **changes: object) -> None:
        self.cfg = tiny_config(**changes)
        self.model = build_model(self.cfg)
        self.wrapped = wrap_for_training(self.model, self.cfg)
        self.optimizer = build_optimizer([self.wrapped], self.cfg)
        self.objective = build_objective(self.cfg)
        self.routers = [module for module in self.model.modules() if isinstance(module, VPMoERouter)]

    def step(self, seed: int = 0):
        return train_step(self.wrapped, self.optimizer, self.objective, [random_batch(*BATCH, seed=seed)])

    def weights(self) -> dict[str, torch.Tensor]:
        biases = {f"bias {i}": router.expert_bias.clone() for i, router in enumerate(self.routers)}
        return {**{n: p.detach().clone() for n, p in self.model.named_parameters()}, **biases}


def test_every_parameter_is_reached() -> None:
    setup = Setup()
    for seed in range(3):
        setup.step(seed)
    before = setup.weights()
    assert setup.step(3).updated
    after = setup.weights()
    still = [name for name, value in before.items() if torch.equal(value, after[name])]
    assert not still


def test_expert_biases_move_against_the_load() -> None:
    """DeepSeek-V3: by the update rate, up below the mean load and down above it."""
    setup = Setup(moe_router_bias_update_rate=0.01)
    setup.step()
    for router in setup.routers:
        load = router.tokens_per_expert
        torch.testing.assert_close(router.expert_bias, 0.01 * torch.sign(load.mean() - load))
        assert load.max() > load.mean()


@pytest.mark.parametrize("bf16", [False, True])
def test_a_gradient_that_is_not_finite_moves_nothing(bf16: bool) -> None:
    setup = Setup(bf16=bf16)
    setup.step()
    weight = setup.model.decoder.layers[1].self_attention.linear_proj.weight
    hook = weight.register_hook(lambda grad: grad * math.inf)
    before = setup.weights()
    result = setup.step(1)
    assert not result.updated and not math.isfinite(result.grad_norm)
    after = setup.weights()
    assert all(torch.equal(before[name], after[name]) for name in before)
    hook.remove()
    assert setup.step(2).updated


def test_a_loss_that_is_not_finite_moves_nothing() -> None:
    setup = Setup()
    setup.step()
    with torch.no_grad():
        setup.model.output_layer.weight[3, 0] = math.nan
    before = setup.weights()
    result = setup.step(1)
    assert not result.updated and not math.isfinite(result.metrics["loss/total"])
    after = setup.weights()
    assert all(torch.equal(before[name].nan_to_num(), after[name].nan_to_num()) for name in before)


def test_evaluation_equals_the_training_loss_and_counts_nothing() -> None:
    setup = Setup()
    batch = random_batch(*BATCH, seed=0)
    valid = evaluate(setup.model, setup.objective, [batch])
    assert setup.model.training
    assert all(router.tokens_per_expert.sum() == 0 for router in setup.routers)
    result = train_step(setup.wrapped, setup.optimizer, setup.objective, [batch])
    for tag in ("loss/total", "loss/analysis", "loss/final", "tokens/real"):
        assert valid[tag] == pytest.approx(result.metrics[tag], rel=1e-6)


def test_a_stop_in_the_middle_of_a_batch_leaves_all_as_it_was() -> None:
    """Asked for during the first micro-batch of many; the step done again is the step that was never interrupted."""
    batches = [random_batch(*BATCH, seed=seed) for seed in range(20)]
    setups = []
    for interrupted in (False, True):
        torch.manual_seed(1)
        setups.append(setup := Setup())
        setup.step()
        before, stop, passes = setup.weights(), StopRequest(), 0

        def counted(*_: object, stop: StopRequest = stop) -> None:
            nonlocal passes
            passes += 1
            if passes == 2:
                stop._handle(signal.SIGTERM, None)

        if interrupted:
            hook = setup.model.register_forward_hook(counted)
            with pytest.raises(Interrupted):
                train_step(setup.wrapped, setup.optimizer, setup.objective, batches, stop.check())
            assert 2 <= passes < 20
            assert all(torch.equal(value, before[name]) for name, value in setup.weights().items())
            with pytest.raises(Interrupted):
                evaluate(setup.model, setup.objective, batches, stop.check())
            assert setup.model.training and passes < 20
            hook.remove()
        train_step(setup.wrapped, setup.optimizer, setup.objective, batches[:2])
    straight, again = (setup.weights() for setup in setups)
    assert all(torch.equal(value, again[name]) for name, value in straight.items())


def test_what_is_trained_goes_with_its_last_user() -> None:
    """Nothing beyond Python's collector holds it, and with it its process groups and their threads."""
    setup = Setup()
    setup.step()
    wrapped = weakref.ref(setup.wrapped)
    del setup
    gc.collect()
    assert wrapped() is None
