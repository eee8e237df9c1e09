"""An HF directory into a Megatron checkpoint, and a Megatron checkpoint into an HF directory.

Both read and write tensor by tensor. A checkpoint that was imported remembers what HF's configuration said beyond the
geometry, how many rows of the embedding mean something, and the tokenizer's files; so the export needs nothing else.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron_vpmoe.config import RunConfig, geometry_diff
from megatron_vpmoe.files import json_bytes, sync, write_atomically
from vpmoe.errors import WeightsError
from vpmoe.hf import qwen3, student, tokenizer_files
from vpmoe.weights import megatron_checkpoint, safetensors_folder
from vpmoe.weights.geometry import config_of, conform, geometry_of
from vpmoe.weights.tensors import LazyTensor, weights_sha256

ASSETS = tokenizer_files.FILES
# Written anew from the geometry, or true of one version of a library only.
_NOT_KEPT = ("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "layer_types", "rope_scaling")

Progress = Callable[[str, int], None]


def _silent(_name: str, _size: int) -> None:
    return


@dataclass(frozen=True)
class Written:
    """A finished conversion: where it lies, and one hash of its tensors whatever files they are in."""

    path: Path
    weights_sha256: str
    tensor_sha256: dict[str, str]


@dataclass(frozen=True)
class HFModel:
    """An HF directory of a Qwen3 or of a student of ours, opened: nothing but shapes is read.

    Attributes:
        weights: under our names, in our layout.
        cfg: our geometry.
        vocab_size: rows of HF's embedding; the rows of ours beyond them are padding.
        kept: what ``config.json`` says beyond the geometry.
        assets: tokenizer and generation files.
    """

    folder: Path
    weights: dict[str, LazyTensor]
    cfg: RunConfig
    vocab_size: int
    kept: dict[str, Any]
    assets: list[Path]

    def run_state(self) -> dict[str, Any]:
        """What a checkpoint of these weights has to remember."""
        return run_state(self.cfg, vocab_size=self.vocab_size, kept=self.kept)


def run_state(cfg: RunConfig, *, vocab_size: int, kept: Mapping[str, Any]) -> dict[str, Any]:
    """``run_state.json`` of a checkpoint without training: geometry, true vocabulary size, HF's other keys."""
    return {"kind": "weights", "config": geometry_of(cfg), "vocab_size": vocab_size, "hf_config": dict(kept)}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of an HF directory.

    Raises:
        WeightsError: it is missing or no JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"no readable config.json: {error}", source=str(folder), remedy="name an HF model directory"
        ) from error
    if not isinstance(config, dict):
        raise WeightsError("config.json holds no object", source=str(path))
    return config


def open_directory(
    folder: Path,
    *,
    cfg: RunConfig | None = None,
    padded_vocab_size: int | None = None,
    dtype: torch.dtype | None = None,
) -> HFModel:
    """Open an HF directory: a dense Qwen3 of any size, or a rung that was exported from here.

    Args:
        cfg: the geometry that it has to have; None derives it.
        padded_vocab_size: rows of our embedding; None takes those of ``cfg``, or HF's.
        dtype: None keeps each tensor's own.

    Raises:
        WeightsError: not such a directory, or another geometry than ``cfg``; every differing field is named.
    """
    source = str(folder / "config.json")
    config = read_config(folder)
    if cfg is not None and padded_vocab_size is None:
        padded_vocab_size = cfg.model.padded_vocab_size
    form = student if config.get("model_type") == "vpmoe" else qwen3
    derived = form.geometry(config, source=source, padded_vocab_size=padded_vocab_size)
    if cfg is None:
        cfg = config_of(derived, source=source)
    differing = [
        f"{change.key.split('.')[1]}: {change.old!r}, expected {change.new!r}"
        for change in geometry_diff(config_of(derived, source=source), cfg)
    ]
    if differing:
        raise WeightsError(
            "another geometry than the declared one:\n    " + "\n    ".join(differing),
            source=source,
            remedy="name the right directory, or correct the declared configuration",
        )
    theirs = safetensors_folder.read_weights(folder)
    ours = form.to_megatron(theirs, cfg, source=str(folder))
    produced = form.hf_config(cfg, vocab_size=0, dtype=torch.float32, kept={})
    return HFModel(
        folder=folder,
        weights=conform(ours, cfg, dtype, source=str(folder)),
        cfg=cfg,
        vocab_size=int(config["vocab_size"]),
        kept={key: value for key, value in config.items() if key not in produced and key not in _NOT_KEPT},
        assets=[
            *tokenizer_files.assets_of(folder),
            *(path for path in [folder / tokenizer_files.GENERATION] if path.is_file()),
        ],
    )


def import_directory(model: HFModel, directory: Path, *, progress: Progress = _silent) -> Written:
    """Write an opened HF model as ``directory/iter_0000000``, whole or not at all."""
    path, hashes = megatron_checkpoint.write_checkpoint(
        directory, model.weights, model.run_state(), assets=model.assets, progress=progress
    )
    return Written(path, weights_sha256(hashes), hashes)


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = safetensors_folder.SHARD_BYTES,
    progress: Progress = _silent,
) -> Written:
    """Write a checkpoint as an HF directory, whole or not at all; nothing but the checkpoint is read.

    Args:
        checkpoint: ``iter_NNNNNNN``, or a run or checkpoints directory (the newest complete one is taken).
        folder: must not exist.
        dtype: of the weights; None keeps each tensor's own.
        shard_bytes: a weight file is closed before it grows beyond this.

    Raises:
        WeightsError: ``folder`` exists.
    """
    from megatron_vpmoe.training.checkpoint import ASSETS as STORED_ASSETS
    from megatron_vpmoe.training.checkpoint import open_checkpoint

    if folder.exists():
        raise WeightsError("the target exists already", source=str(folder), remedy="remove it or name another one")
    found = open_checkpoint(checkpoint)
    cfg = config_of(found.state["config"], source=str(found.path / "run_state.json"))
    form = qwen3 if qwen3.is_qwen3(cfg) else student
    vocab_size = int(found.state.get("vocab_size", cfg.model.padded_vocab_size))
    ours = conform(megatron_checkpoint.read_weights(found.path), cfg, dtype, source=str(found.path))
    theirs = form.from_megatron(ours, cfg, vocab_size=vocab_size)
    stored = next(iter(ours.values())).dtype
    assets = sorted((found.path / STORED_ASSETS).glob("*"))
    made, token_ids = tokenizer_files.made_from(assets)
    kept = dict(found.state.get("hf_config", {}))
    kept |= {key: value for key, value in token_ids.items() if kept.get(key) is None}
    kept |= {"prompts": found.state["prompts"]} if found.state.get("prompts") else {}
    config = form.hf_config(cfg, vocab_size=vocab_size, dtype=stored, kept=kept)

    partial = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    hashes = safetensors_folder.write_weights(partial, theirs, shard_bytes=shard_bytes, progress=progress)
    write_atomically(partial / "config.json", json_bytes(config))
    for code in student.CODE if form is student else ():
        shutil.copyfile(code, partial / code.name)
    for name, content in made.items():
        (partial / name).write_bytes(content)
    for asset in assets:
        shutil.copyfile(asset, partial / asset.name)
    tokenizer_files.give_harmony_template(partial)
    sync(partial)
    os.replace(partial, folder)
    sync(folder.parent)
    return Written(folder, weights_sha256(hashes), hashes)
