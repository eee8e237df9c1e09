"""bf16 parameters with fp32 islands, proven by what a real pass computes in: as built, cast, and loaded."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from precision_probe import HALF, PrecisionProbe
from student_cases import lively_model
from torch import Tensor

from megatron_vpmoe.data.batch import Batch
from megatron_vpmoe.model.attention.masks import SequenceLayout
from megatron_vpmoe.model.builder import build_model, wrap_for_training
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.objectives import build_objective
from megatron_vpmoe.optim import build_optimizer, build_scheduler
from megatron_vpmoe.training import checkpoint
from megatron_vpmoe.training.step import global_totals, train_step
from tests.tiny import random_batch, tiny_config
from tests.training_runs import checkpoint_tensors

pytestmark = pytest.mark.usefixtures("single_process")

# 12 experts: a number that no other dimension of the tiny model has.
TINY_BF16 = {"num_experts": 12, "bf16": True}
ISLANDS = {"sink", "grape_log_freq", "value_residual_scale"}
SEEN = {
    "softmax",
    "exponential",
    "statistics",
    "rotation",
    "routing",
    "router product",
    "cosine or sine",
    *ISLANDS,
}


def islands(model: torch.nn.Module) -> dict[str, Tensor]:
    found = {name: p.data for name, p in model.named_parameters() if name.rsplit(".", 1)[-1] in ISLANDS}
    assert len(found) == 4 + 3 + 3
    return found


def batch_of(seed: int = 1) -> Batch:
    return random_batch(2, 48, 64, seed=seed)


def probe(model: VPModel, **changes: object) -> PrecisionProbe:
    """Forward and backward of one batch under the run's own objective; gradients are checked, too."""
    cfg = tiny_config(**{**TINY_BF16, **changes})
    objective, batch = build_objective(cfg), batch_of()
    by_kind = {kind: [t for name, t in islands(model).items() if name.endswith(kind)] for kind in ISLANDS}
    recorded = PrecisionProbe(by_kind, experts=12)
    with recorded:
        output = model(batch.tokens, SequenceLayout(batch.document_id, batch.position_ids))
        objective(output, batch, global_totals(objective, [batch])).loss.backward()
    for name, tensor in islands(model).items():
        parameter = model.get_parameter(name)
        # Under DDP the gradient goes into its fp32 buffer at once.
        gradient = parameter.main_grad if parameter.grad is None else parameter.grad
        assert gradient.dtype == tensor.dtype == torch.float32, name
        assert gradient.abs().max() > 0, name
    return recorded


def check(recorded: PrecisionProbe, *, fused: bool) -> None:
    assert recorded.violations == []
    assert recorded.seen.keys() == SEEN | ({"fused attention"} if fused else set())
    assert all(dtypes == {torch.float32} for dtypes in recorded.seen.values()), recorded.seen


def is_island_or_buffer(model: VPModel) -> None:
    """The rest is bf16: the pass is a bf16 pass."""
    for name, parameter in model.named_parameters():
        wanted = torch.float32 if name.rsplit(".", 1)[-1] in ISLANDS else torch.bfloat16
        assert parameter.dtype == wanted, name
    assert all(buffer.dtype == torch.float32 for buffer in model.buffers())


@pytest.mark.parametrize("recompute", [None, "full"])
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_as_built(backend: str, recompute: str | None) -> None:
    changes = {"attention_backend": backend, "recompute_granularity": recompute}
    model = build_model(tiny_config(**TINY_BF16, **changes)).train()
    is_island_or_buffer(model)
    check(probe(model, **changes), fused=backend == "auto")


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_an_fp32_model_cast_to_bfloat16(backend: str) -> None:
    model = lively_model(num_experts=12, attention_backend=backend)
    before = {name: tensor.clone() for name, tensor in islands(model).items()}
    model = model.bfloat16().train()
    is_island_or_buffer(model)
    for name, tensor in islands(model).items():
        assert torch.equal(tensor, before[name]), f"{name} went through bf16"
    check(probe(model, attention_backend=backend), fused=backend == "auto")


def test_after_a_checkpoint(tmp_path: Path) -> None:
    """Two steps, saved, loaded into a fresh run: islands keep all their bits, on disk and in the model."""
    cfg = tiny_config(**TINY_BF16)

    def fresh() -> tuple:
        model = build_model(cfg)
        wrapped = wrap_for_training(model, cfg)
        optimizer = build_optimizer([wrapped], cfg)
        return model, wrapped, optimizer, build_scheduler(optimizer, cfg)

    model, wrapped, optimizer, scheduler = fresh()
    scheduler.step(1)
    for seed in (1, 2):
        assert train_step(wrapped, optimizer, build_objective(cfg), [batch_of(seed)]).updated
        scheduler.step(1)
    assert {p.main_grad.dtype for p in model.parameters()} == {torch.float32}
    saved = {name: tensor.clone() for name, tensor in islands(model).items()}
    rounded = [name for name, tensor in saved.items() if torch.equal(tensor, tensor.bfloat16().float())]
    assert not rounded, "moved by less than bf16 can tell, or kept in bf16"
    path = checkpoint.save(tmp_path, {"iteration": 2, "world_size": 1}, model, optimizer, scheduler).wait()
    on_disk = checkpoint_tensors(path)
    for name, tensor in saved.items():
        assert torch.equal(on_disk[name], tensor), name

    model, wrapped, optimizer, scheduler = fresh()
    checkpoint.load(checkpoint.open_checkpoint(path), model, optimizer, scheduler)
    is_island_or_buffer(model)
    for name, tensor in islands(model).items():
        assert torch.equal(tensor, saved[name]), name
    check(probe(model.train()), fused=True)


def test_the_probe_sees_what_is_too_narrow() -> None:
    """A router in the model's precision, which the configuration permits, is found; so are a norm and a λ in bf16."""
    model = build_model(tiny_config(**TINY_BF16, moe_router_dtype=None)).train()
    found = probe(model, moe_router_dtype=None).violations
    assert any(line.startswith("router product") for line in found)
    assert any(line.startswith("routing") for line in found)

    scale, x = torch.ones(()), torch.ones(4, 4, dtype=torch.bfloat16)
    with PrecisionProbe({"λ": [scale]}, experts=12) as recorded:
        torch.rsqrt((x * x).sum())
        scale * x
    assert [line.split(":")[0] for line in recorded.violations] == ["statistics", "λ"]


def test_bf16_positions_are_as_good_at_2000_as_at_0() -> None:
    """By value, without looking inside: a shift of all positions does not widen the distance to the fp32 model."""
    batch, distances = batch_of(), []
    wide = lively_model(num_experts=None, window_attn_skip_freq=99).eval()
    narrow = lively_model(num_experts=None, window_attn_skip_freq=99).eval()
    narrow.load_state_dict(wide.state_dict())
    narrow.bfloat16()
    for shift in (0, 2000):
        layout = SequenceLayout(batch.document_id, batch.position_ids + shift)
        with torch.no_grad():
            exact, rounded = (model(batch.tokens, layout).logits().float() for model in (wide, narrow))
        distances.append(float((exact - rounded).norm() / exact.norm()))
    assert 1e-4 < distances[0] < 0.05
    assert distances[1] < 1.2 * distances[0]
    assert next(narrow.parameters()).dtype in HALF
