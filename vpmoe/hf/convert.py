"""An HF directory into a Megatron checkpoint, and a Megatron checkpoint into an HF directory.

Both read and write tensor by tensor. A checkpoint that was imported remembers what HF's configuration said beyond the
geometry, how many rows of the embedding mean something, the system and developer messages that the model was taught
under, and the tokenizer's files; so the export needs nothing else.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from megatron_vpmoe.config import RunConfig, geometry_diff
from megatron_vpmoe.files import json_bytes, read_json, sha256_of_file, write_atomically
from vpmoe import steps
from vpmoe.errors import WeightsError
from vpmoe.hf import qwen3, source_checks, student, tokenizer_files
from vpmoe.weights import megatron_checkpoint, safetensors_folder
from vpmoe.weights.geometry import config_of, conform, geometry_of
from vpmoe.weights.tensors import LazyTensor, weights_sha256

ASSETS = tokenizer_files.FILES
# Written anew from the geometry, or true of one version of a library only.
_NOT_KEPT = (
    *("architectures", "auto_map", "dtype", "torch_dtype", "transformers_version", "layer_types", "rope_scaling"),
    "prompts",
)
_PACKAGES = ("torch", "transformers", "safetensors")

Progress = Callable[[str, int], None]


@dataclass(frozen=True)
class Written:
    """A finished conversion: where it lies, and one hash of its tensors whatever files they are in."""

    path: Path
    weights_sha256: str
    tensor_sha256: dict[str, str]


@dataclass(frozen=True)
class Carried:
    """What goes with weights from a checkpoint to the next, whether converted, trained on, exported or imported.

    Attributes:
        vocab_size: rows of HF's embedding; the rows of ours beyond them are padding.
        hf_config: what HF's ``config.json`` says beyond the geometry.
        prompts: the ``system`` and ``developer`` messages that the model was taught under; None where nobody knows.
    """

    vocab_size: int
    hf_config: dict[str, Any] = field(default_factory=dict)
    prompts: dict[str, str | None] | None = None

    @classmethod
    def of(cls, checkpoint: Path, cfg: RunConfig) -> Carried:
        """What the ``run_state.json`` of ``iter_NNNNNNN`` holds of it; ``WeightsError``: not what is written there."""
        state, rows = megatron_checkpoint.read_state(checkpoint), cfg.model.padded_vocab_size
        told = {"vocab_size": state.get("vocab_size", rows), "prompts": state.get("prompts")}
        source = str(checkpoint / megatron_checkpoint.RUN_STATE)
        size = source_checks.validated(source_checks.HFConfig, told, source=source).vocab_size
        hf_config = state.get("hf_config", {})
        if size > rows or not isinstance(hf_config, dict):
            what = f"vocab_size is {size} of {rows} rows, and hf_config {type(hf_config).__name__}"
            raise WeightsError(what, source=source, remedy="name a checkpoint that was written here")
        return cls(size, {key: value for key, value in hf_config.items() if key not in _NOT_KEPT}, told["prompts"])


@dataclass(frozen=True)
class HFModel:
    """An HF directory of a Qwen3 or of a student of ours, opened: nothing but shapes is read.

    Attributes:
        form: of its names and configuration, ``qwen3`` or ``student``.
        weights: under our names, in our layout.
        cfg: our geometry.
        carried: see ``Carried``.
        assets: tokenizer and generation files.
    """

    folder: Path
    form: ModuleType
    weights: dict[str, LazyTensor]
    cfg: RunConfig
    carried: Carried
    assets: list[Path]


def run_state(cfg: RunConfig, carried: Carried) -> dict[str, Any]:
    """``run_state.json`` of a checkpoint without training: geometry, and what is handed on."""
    return {"kind": "weights", "config": geometry_of(cfg), **asdict(carried)}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of an HF directory.

    Raises:
        WeightsError: it is missing or no JSON object.
    """
    return read_json(folder / "config.json", error=WeightsError, remedy="name an HF model directory")


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
        WeightsError: not such a directory, another geometry than ``cfg``, or weights that are not what the
            configuration describes; names every field and tensor.
        TokenizerError: its tokenizer is damaged, or has ids that have no row.
    """
    source = str(folder / "config.json")
    config = read_config(folder)
    if cfg is not None and padded_vocab_size is None:
        padded_vocab_size = cfg.model.padded_vocab_size
    form = student if config.get("model_type") == "vpmoe" else qwen3
    theirs = safetensors_folder.read_weights(folder)
    source_checks.check_layers(config, theirs, source=source)
    derived = form.geometry(config, source=source, padded_vocab_size=padded_vocab_size)
    vocab_size: int = config["vocab_size"]
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
    source_checks.check_tensors(theirs, form, cfg, vocab_size, source=str(folder))
    source_checks.check_tokenizer(folder, vocab_size)
    ours = form.to_megatron(theirs, cfg, source=str(folder))
    produced = form.hf_config(cfg, vocab_size=0, dtype=torch.float32, kept={})
    kept = {key: value for key, value in config.items() if key not in produced and key not in _NOT_KEPT}
    return HFModel(
        folder=folder,
        form=form,
        weights=conform(ours, cfg, dtype, source=str(folder)),
        cfg=cfg,
        carried=Carried(vocab_size, kept, config.get("prompts")),
        assets=[*tokenizer_files.assets_of(folder), *filter(Path.is_file, [folder / tokenizer_files.GENERATION])],
    )


def import_directory(
    model: HFModel,
    directory: Path,
    *,
    overwrite: bool = False,
    progress: Progress = lambda _name, _size: None,
    say: steps.Say = lambda line: None,
) -> Written:
    """Make ``directory`` with the checkpoint of an opened HF model in it, or find it made; a keyed step.

    Args:
        model: what to write.
        directory: gets ``iter_0000000``. Nothing else may be in it, such as a run's checkpoints.
        overwrite: replace what an import of something else made there.
        progress: told each tensor's name and bytes.
        say: told a line about what is found and replaced.

    Raises:
        NotOursError: something that no import made lies there; or an import of something else, and no ``overwrite``.
    """
    files = [*model.assets, *(model.folder / name for name in safetensors_folder.weight_files(model.folder))]
    step = steps.Step(
        kind="hf-import",
        version=1,
        output=directory,
        decides={
            "files": {path.name: sha256_of_file(path) for path in files},
            "dtypes": sorted({str(tensor.dtype) for tensor in model.weights.values()}),
            "state": (state := run_state(model.cfg, model.carried)),
        },
        packages=_PACKAGES,
        inputs=(model.folder,),
    )

    def make(work: steps.Work) -> dict[str, Any]:
        shutil.rmtree(megatron_checkpoint.checkpoint_in(work.folder), ignore_errors=True)
        _, hashes = megatron_checkpoint.write_checkpoint(
            work.folder, model.weights, state, assets=model.assets, progress=progress
        )
        return {"weights_sha256": weights_sha256(hashes), "tensors": hashes}

    found = steps.run(step, make, overwrite=overwrite, say=say)["report"]
    return Written(megatron_checkpoint.checkpoint_in(directory), found["weights_sha256"], found["tensors"])


def export_checkpoint(
    checkpoint: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = safetensors_folder.SHARD_BYTES,
    overwrite: bool = False,
    progress: Progress = lambda _name, _size: None,
    say: steps.Say = lambda line: None,
) -> Written:
    """Make an HF directory of a checkpoint, or find it made; a keyed step. Nothing but the checkpoint is read.

    Args:
        checkpoint: ``iter_NNNNNNN``, or a run or checkpoints directory (the newest complete one is taken).
        folder: of the step.
        dtype: of the weights; None keeps each tensor's own.
        shard_bytes: a weight file is closed before it grows beyond this.
        overwrite: replace what an export of another checkpoint made there.
        progress: told each tensor's name and bytes.
        say: told a line about what is found and replaced.

    Raises:
        NotOursError: something that no export made lies there; or an export of something else, and no ``overwrite``.
    """
    from megatron_vpmoe.training.checkpoint import open_checkpoint

    found = open_checkpoint(checkpoint)
    step = steps.Step(
        kind="hf-export",
        version=3,
        output=folder,
        decides={
            "checkpoint": {"name": found.path.name, "files": sha256_of_file(found.path / "files.json")},
            "dtype": str(dtype),
            "shard_bytes": shard_bytes,
        },
        packages=_PACKAGES,
        inputs=(found.path,),
    )

    def make(work: steps.Work) -> dict[str, Any]:
        hashes = write_hf_directory(found.path, work.folder, dtype=dtype, shard_bytes=shard_bytes, progress=progress)
        told = {"weights_sha256": weights_sha256(hashes), "tensors": hashes}
        return {**told, "origin": megatron_checkpoint.origin_of(found.state)}

    report = steps.run(step, make, overwrite=overwrite, say=say)["report"]
    return Written(folder, report["weights_sha256"], report["tensors"])


def write_hf_directory(
    checkpoint: Path,
    folder: Path,
    *,
    dtype: torch.dtype | None = None,
    shard_bytes: int = safetensors_folder.SHARD_BYTES,
    progress: Progress = lambda _name, _size: None,
) -> dict[str, str]:
    """Write the files of an HF directory into ``folder``, which exists; returns HF's name -> ``tensor_sha256``.

    ``config.json`` keeps the ``provenance`` of the run that trained the weights.
    """
    from megatron_vpmoe.training.checkpoint import ASSETS as STORED_ASSETS

    cfg = megatron_checkpoint.read_config(checkpoint)
    carried = Carried.of(checkpoint, cfg)
    form = qwen3 if qwen3.is_qwen3(cfg) else student
    ours = conform(megatron_checkpoint.read_weights(checkpoint), cfg, dtype, source=str(checkpoint))
    theirs = form.from_megatron(ours, cfg, vocab_size=carried.vocab_size)
    assets = sorted((checkpoint / STORED_ASSETS).glob("*"))
    made, token_ids = tokenizer_files.made_from(assets)
    # The messages come first: what is kept comes in the order of the directory before, and so are the same again.
    kept: dict[str, Any] = {} if carried.prompts is None else {"prompts": carried.prompts}
    kept |= carried.hf_config | {k: v for k, v in token_ids.items() if carried.hf_config.get(k) is None}
    if (trained_on := megatron_checkpoint.sequence_length(checkpoint)) is not None:
        kept.setdefault(source_checks.POSITIONS, trained_on)
    kept |= {key: value for key, value in megatron_checkpoint.read_state(checkpoint).items() if key == "provenance"}
    stored = next(iter(ours.values())).dtype
    config = form.hf_config(cfg, vocab_size=carried.vocab_size, dtype=stored, kept=kept)

    hashes = safetensors_folder.write_weights(folder, theirs, shard_bytes=shard_bytes, progress=progress)
    write_atomically(folder / "config.json", json_bytes(config))
    for code in student.CODE if form is student else ():
        shutil.copyfile(code, folder / code.name)
    for name, content in made.items():
        (folder / name).write_bytes(content)
    for name, content in tokenizer_files.kept_of(assets).items():
        (folder / name).write_bytes(content)
    tokenizer_files.give_harmony_template(folder, carried.prompts)
    source_checks.check_tokenizer(folder, carried.vocab_size)
    return hashes
