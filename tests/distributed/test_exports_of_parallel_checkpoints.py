"""A checkpoint saved by two tensor- or expert-parallel ranks exports to the HF directory that one process's gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_config
from tests.workers import run_workers
from vpmoe.hf.convert import export_checkpoint, run_state
from vpmoe.weights.geometry import expected_shapes
from vpmoe.weights.megatron_checkpoint import write_checkpoint
from vpmoe.weights.tensors import LazyTensor

pytestmark = pytest.mark.slow
CASES = {
    "tensor parallel": {"num_experts": None, "num_layers": 2, "window_attn_skip_freq": 2, "activation": "swiglu"},
    "expert parallel": {"num_layers": 2, "window_attn_skip_freq": 2},
}
SIZES = {
    "tensor parallel": {"tensor_model_parallel_size": 2},
    "expert parallel": {"expert_model_parallel_size": 2},
}


def save_again(name: str, source: str, target: str) -> None:
    """Start from weights as a run does, and save as it does."""
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.optim import build_optimizer, build_scheduler
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training import checkpoint
    from megatron_vpmoe.training.initial_weights import load_initial_weights

    # AdamW: NorMuon refuses matrices that ranks share.
    cfg = tiny_config(**CASES[name], **SIZES[name], load_weights=source, optimizer="adam")
    distributed.initialize(seed=1, **SIZES[name])
    model = build_model(cfg)
    found = load_initial_weights(model, cfg)
    optimizer = build_optimizer([wrap_for_training(model, cfg)], cfg)
    state: dict[str, Any] = {"iteration": 1, "world_size": 2, "config": cfg.model_dump(mode="json")}
    scheduler = build_scheduler(optimizer, cfg)
    checkpoint.save(Path(target), state, model, optimizer, scheduler, carried=checkpoint.Carried.of(found))
    distributed.shutdown()


@pytest.mark.parametrize("name", CASES)
def test_same_directory(name: str, tmp_path: Path) -> None:
    cfg = tiny_config(**CASES[name])
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: LazyTensor.of(torch.randn(shape, generator=generator)) for key, shape in expected_shapes(cfg).items()
    }
    vocabulary = tmp_path / "tokenizer.json"
    vocabulary.write_text("{}")
    state = run_state(cfg, vocab_size=64, kept={"eos_token_id": 5})
    source, _ = write_checkpoint(tmp_path / "source", weights, state, assets=[vocabulary])
    run_workers(2, save_again, name, str(source), str(tmp_path / "saved"), folder=tmp_path)

    one, two = (export_checkpoint(tmp_path / part, tmp_path / f"hf_{part}") for part in ("source", "saved"))
    assert one.tensor_sha256 == two.tensor_sha256
    for file in ("config.json", "tokenizer.json", "modeling_vpmoe.py"):
        assert (one.path / file).read_bytes() == (two.path / file).read_bytes(), file
