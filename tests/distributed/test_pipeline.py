"""A pipeline of two stages is one process: losses, gradients, weights, router health, validation and samples."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.gradients import whole_gradients
from tests.tiny import TINY, random_batch, rows_of, tiny_config
from tests.workers import run_workers

STEPS, ROWS = 3, TINY["global_batch_size"]
DENSE = {"num_experts": None, "router_dead_experts_warn": None}
CASES: dict[str, dict[str, object]] = {
    "moe": {},
    "dense": DENSE,
    "one layer and three": {**DENSE, "num_layers_in_first_pipeline_stage": 1},
    "three layers and one, recomputed": {"num_layers_in_last_pipeline_stage": 1, "recompute_granularity": "full"},
    "tied embeddings": {**DENSE, "untie_embeddings_and_output_weights": False},
    "no value residual": {"value_residual": False},
    "bf16": {"bf16": True},
}
PROMPTS = [[5, 9, 31], [7], [12, 3, 44, 8, 2, 19, 23, 6, 11, 40]]


def train_cases(stages: int, cases: dict[str, dict[str, object]]) -> dict[str, dict[str, Any]]:
    """A few steps of each case on this process's share of fixed global batches."""
    from megatron.core import parallel_state

    from megatron_vpmoe.runtime import distributed

    results = {}
    for name, changes in cases.items():
        distributed.initialize(seed=7, pipeline_model_parallel_size=stages)
        results[name] = _train(stages, **_for_stages(stages, changes))
        parallel_state.destroy_model_parallel()
    distributed.shutdown()
    return results


def _for_stages(stages: int, changes: dict[str, object]) -> dict[str, object]:
    return changes if stages > 1 else {name: value for name, value in changes.items() if "pipeline_stage" not in name}


def _train(stages: int, **changes: object) -> dict[str, Any]:
    from megatron.core import parallel_state

    from megatron_vpmoe.generation.engine import generate
    from megatron_vpmoe.generation.prompts import Prompt
    from megatron_vpmoe.generation.sampling import SamplingOptions
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.objectives import build_objective
    from megatron_vpmoe.optim import build_optimizer, build_scheduler
    from megatron_vpmoe.runtime import pulse
    from megatron_vpmoe.training.evaluate import evaluate
    from megatron_vpmoe.training.router import RouterMonitor
    from megatron_vpmoe.training.step import train_step

    cfg = tiny_config(
        pipeline_model_parallel_size=stages, micro_batch_size=1, moe_per_layer_logging=True, clip_grad=0.5, **changes
    )
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    model = build_model(cfg)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "value_residual_scale" in name:
                parameter.fill_(0.7)
    initial = {model.absolute_name(name): p.detach().clone() for name, p in model.named_parameters()}
    wrapped = wrap_for_training(model, cfg)
    optimizer, objective = build_optimizer([wrapped], cfg), build_objective(cfg)
    scheduler, monitor = build_scheduler(optimizer, cfg), RouterMonitor(model, cfg)
    gradients: list[dict[str, torch.Tensor]] = []
    prepare = optimizer.prepare_grads

    def recorded() -> Any:
        gradients.append({model.absolute_name(name): grad for name, grad in whole_gradients(wrapped).items()})
        return prepare()

    optimizer.prepare_grads = recorded
    share, losses, norms, health = ROWS // size, [], [], {}
    for step in range(STEPS):
        whole = random_batch(ROWS, TINY["seq_length"], TINY["padded_vocab_size"], seed=step)
        mine = [rows_of(whole, row, row + 1) for row in range(rank * share, (rank + 1) * share)]
        monitor.reset()
        result = train_step(wrapped, optimizer, objective, mine)
        health = monitor.metrics(result.metrics["tokens/real"])
        scheduler.step(1)
        losses.append(result.metrics["loss/total"])
        norms.append(result.grad_norm)
    dropped = _step_with_infinite_gradient(model, lambda: train_step(wrapped, optimizer, objective, mine))
    whole = random_batch(ROWS, TINY["seq_length"], TINY["padded_vocab_size"], seed=STEPS)
    mine = [rows_of(whole, row, row + 1) for row in range(rank * share, (rank + 1) * share)]
    signs: list[None] = []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(pulse, "beat", lambda: signs.append(None))
        valid = evaluate(model, objective, mine)
    prompts, options = [Prompt(ids) for ids in PROMPTS], SamplingOptions(12, stop_ids=(1,))
    samples = [one.ids for one in generate(model, prompts, options)]
    assert [one.ids for one in generate(model, prompts, options, cached=False)] == samples
    state = {model.absolute_name(n): p.detach().clone() for n, p in model.named_parameters()}
    biases = {model.absolute_name(n): b.clone() for n, b in model.named_buffers() if n.endswith("expert_bias")}
    return {
        "scalars": {"loss": losses, "norm": norms, **{tag: [value] for tag, value in {**health, **valid}.items()}},
        "samples": samples,
        "signs of life": (len(signs), len(mine)),
        "dropped": dropped,
        "initial": initial,
        "gradients": gradients[0],
        "parameters": state,
        "biases": biases,
    }


def _step_with_infinite_gradient(model: Any, step: Callable[[], Any]) -> tuple[bool, bool]:
    """A step during which the first stage alone has a bad gradient: (did it update, did anything here move)."""
    moving = [*model.parameters(), *(b for name, b in model.named_buffers() if name.endswith("expert_bias"))]
    before = [tensor.detach().clone() for tensor in moving]
    hooks = []
    if model.stage.is_first:
        hooks.append(model.decoder.layers[0].input_layernorm.weight.register_hook(lambda grad: grad * math.inf))
    result = step()
    for hook in hooks:
        hook.remove()
    return result.updated, any(not torch.equal(a, b) for a, b in zip(before, moving, strict=True))


@pytest.fixture(scope="module")
def two_stages(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, Any]]]:
    return run_workers(2, train_cases, 2, CASES, folder=tmp_path_factory.mktemp("two"))


def joined(results: list[dict[str, Any]], key: str) -> dict[str, torch.Tensor]:
    """By name, over all stages."""
    found: dict[str, torch.Tensor] = {}
    for result in results:
        found |= result[key]
    return found


def assert_same(results: list[dict[str, Any]], expected: dict[str, Any], *, tied: bool, bf16: bool) -> None:
    for result in results:
        assert result["dropped"] == (False, False)
        assert result["scalars"].keys() == expected["scalars"].keys()
        for tag, values in expected["scalars"].items():
            assert result["scalars"][tag] == pytest.approx(values, rel=2e-2 if bf16 else 2e-6, abs=1e-7), tag
        if not bf16:
            assert result["samples"] == expected["samples"]
    for key, rtol, atol in (("initial", 0, 0), ("gradients", 1e-5, 1e-7), ("parameters", 1e-4, 2e-5), ("biases", 0, 0)):
        if bf16 and key != "initial":
            rtol, atol = 2e-2, 2e-2
        actual = joined(results, key)
        if tied and key != "biases":
            copy = actual.pop("output_layer.weight")
            assert torch.equal(copy, actual["embedding.word_embeddings.weight"])
        assert actual.keys() == expected[key].keys()
        for name, tensor in expected[key].items():
            torch.testing.assert_close(
                actual[name], tensor, rtol=rtol, atol=atol, msg=lambda m, n=f"{key} {name}": f"{n}: {m}"
            )


@pytest.mark.parametrize("case", CASES)
def test_two_stages(case: str, two_stages: list[dict[str, dict[str, Any]]]) -> None:
    results = [result[case] for result in two_stages]
    expected = train_cases(1, {case: CASES[case]})[case]
    assert_same(results, expected, tied=case.startswith("tied"), bf16=case == "bf16")
    assert not set(results[0]["parameters"]) & set(results[1]["parameters"])
    assert [result["signs of life"] for result in results] == [(ROWS, ROWS)] * 2  # a long validation is no hang


@pytest.mark.slow
def test_two_pipelines_of_two_stages(tmp_path: Path) -> None:
    """Also of a tied embedding, both of whose copies are divided alike."""
    cases = {case: CASES[case] for case in ("moe", "tied embeddings")}
    results = run_workers(4, train_cases, 2, cases, folder=tmp_path)
    for case, expected in train_cases(1, cases).items():
        assert_same([result[case] for result in results], expected, tied=case.startswith("tied"), bf16=False)
