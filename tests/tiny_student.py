"""Checkpoints of tiny rungs of random weights, none of them where it started, alone or with a compact vocabulary."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from tests.tiny import tiny_config
from vpmoe.hf.convert import Carried, run_state
from vpmoe.tokenizer import CompactVocabulary
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, load_o200k_harmony
from vpmoe.weights.geometry import process_groups
from vpmoe.weights.megatron_checkpoint import write_checkpoint
from vpmoe.weights.tensors import LazyTensor


def write_student(
    folder: Path,
    *,
    assets: Sequence[Path] = (),
    kept: dict[str, Any] | None = None,
    prompts: dict[str, str | None] | None = None,
    seed: int = 3,
    iteration: int = 0,
    vocab_size: int | None = None,
    **changes: Any,
) -> Path:
    """``folder/iter_0000000``: sinks, frequencies and expert biases are drawn too."""
    from megatron_vpmoe.model.builder import build_model

    cfg = tiny_config(**changes)
    torch.manual_seed(seed)
    with process_groups(), torch.no_grad():
        model = build_model(cfg)
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor) * (0.3 if "weight" in name else 0.1))
        state = {name: value for name, value in model.state_dict().items() if isinstance(value, torch.Tensor)}
    weights = {name: LazyTensor.of(value) for name, value in state.items()}
    told = run_state(cfg, Carried(vocab_size or cfg.model.padded_vocab_size, kept or {}, prompts))
    return write_checkpoint(folder, weights, {**told, "iteration": iteration}, assets=assets)[0]


def write_vocabulary(folder: Path, text: str, padded_vocab_size: int) -> list[Path]:
    """A compact vocabulary that holds the tokens of a text, as a checkpoint keeps it."""
    folder.mkdir(parents=True, exist_ok=True)
    counts = np.bincount(load_o200k_harmony().encode_ordinary(text), minlength=VOCAB_SIZE)
    vocabulary = CompactVocabulary.from_counts(load_o200k_harmony(), counts, padded_vocab_size=padded_vocab_size)
    told = {key: getattr(vocabulary, key) for key in ("name", "rank_file_sha256", "vocab_size", "padded_vocab_size")}
    sha256 = vocabulary.save(folder / "compact_vocab.npy")
    told["compact_map"] = {"path": "compact_vocab.npy", "sha256": sha256}
    (folder / "vocabulary.json").write_text(json.dumps(told))
    return [folder / "vocabulary.json", folder / "compact_vocab.npy"]
