"""A checkpoint saved by two tensor-, expert- or pipeline-parallel ranks exports to the HF directory of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.tiny import tiny_config
from tests.workers import run_workers
from vpmoe.hf.convert import Carried, export_checkpoint, run_state
from vpmoe.tokenizer.bpe import save_bpe, train_bpe
from vpmoe.weights.geometry import expected_shapes
from vpmoe.weights.megatron_checkpoint import write_checkpoint
from vpmoe.weights.tensors import LazyTensor

pytestmark = pytest.mark.slow
ROWS: dict[str, Any] = {"padded_vocab_size": 320}
TWO = {"num_layers": 2, "window_attn_skip_freq": 2}
QWEN3 = {
    "num_experts": None,
    "num_layers": 2,
    "add_bias_linear": False,
    "add_qkv_bias": False,
    "activation": "swiglu",
    "softmax_type": "vanilla",
    "window_size": None,
    "global_position_embedding": "rope",
    "tpa": False,
    "value_residual": False,
    "untie_embeddings_and_output_weights": False,
}
CASES = {
    "tensor parallel": {**TWO, "num_experts": None, "activation": "swiglu"},
    "expert parallel": TWO,
    "pipeline parallel": {"num_layers": 4},
    "pipeline parallel, a tied Qwen3": QWEN3,
}
SIZES: dict[str, dict[str, Any]] = {
    "tensor parallel": {"tensor_model_parallel_size": 2},
    "expert parallel": {"expert_model_parallel_size": 2},
    "pipeline parallel": {"pipeline_model_parallel_size": 2},
    "pipeline parallel, a tied Qwen3": {"pipeline_model_parallel_size": 2},
}


def save_again(name: str, source: str, target: str) -> None:
    """Start from weights as a run does, and save as it does."""
    from megatron_vpmoe.model.builder import build_model, wrap_for_training
    from megatron_vpmoe.optim import build_optimizer, build_scheduler
    from megatron_vpmoe.runtime import distributed
    from megatron_vpmoe.training import checkpoint
    from megatron_vpmoe.training.initial_weights import load_initial_weights

    # AdamW: NorMuon refuses matrices that ranks share.
    cfg = tiny_config(**CASES[name], **ROWS, **SIZES[name], load_weights=source, optimizer="adam")
    distributed.initialize(seed=1, **SIZES[name])
    model = build_model(cfg)
    found = load_initial_weights(model, cfg)
    optimizer = build_optimizer([wrap_for_training(model, cfg)], cfg)
    state: dict[str, Any] = {"iteration": 1, "world_size": 2, "config": cfg.model_dump(mode="json")}
    scheduler = build_scheduler(optimizer, cfg)
    checkpoint.save(Path(target), state, model, optimizer, scheduler, carried=checkpoint.Carried.of(found)).wait()
    distributed.shutdown()


@pytest.mark.parametrize("name", CASES)
def test_same_directory(name: str, tmp_path: Path) -> None:
    cfg = tiny_config(**CASES[name], **ROWS)
    generator = torch.Generator().manual_seed(1)
    weights = {
        key: LazyTensor.of(torch.randn(shape, generator=generator)) for key, shape in expected_shapes(cfg).items()
    }
    save_bpe(train_bpe(["the ship"], 259), tmp_path / "bpe")
    state = run_state(cfg, Carried(300, {"eos_token_id": 5}))
    source, _ = write_checkpoint(tmp_path / "source", weights, state, assets=[tmp_path / "bpe" / "tokenizer.json"])
    run_workers(2, save_again, name, str(source), str(tmp_path / "saved"), folder=tmp_path)

    one, two = (export_checkpoint(tmp_path / part, tmp_path / f"hf_{part}") for part in ("source", "saved"))
    assert one.tensor_sha256 == two.tensor_sha256
    files = sorted(path.name for path in one.path.iterdir())
    assert files == sorted(path.name for path in two.path.iterdir())
    assert {"config.json", "tokenizer.json", "model.safetensors"} <= set(files)
    assert ("modeling_vpmoe.py" in files) == (CASES[name] is not QWEN3)
    differing = {file for file in files if (one.path / file).read_bytes() != (two.path / file).read_bytes()}
    assert differing <= {"receipt.json", "config.json"}, "which name the checkpoint, and the length it was trained on"
    told = [json.loads((part.path / "config.json").read_text()) for part in (one, two)]
    assert told[1].pop("max_position_embeddings") == cfg.data.seq_length
    told[0].pop("max_position_embeddings", None)
    assert told[0] == told[1]
