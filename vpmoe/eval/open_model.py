"""Any model that this project knows, opened for inference: a run, a checkpoint, an object of a ladder, an HF directory.

Weights, vocabulary, and the system and developer messages all come from that folder; no dataset is needed.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from megatron_vpmoe.config import RunConfig, stored_faults
from megatron_vpmoe.config.schema_run import ParallelSection
from megatron_vpmoe.data.kd_dataset import check_vocabulary
from megatron_vpmoe.data.vocabulary_files import VOCABULARY, read_vocabulary
from megatron_vpmoe.errors import CheckpointError, TokenizerError
from megatron_vpmoe.files import sha256_of_file, sha256_of_json
from megatron_vpmoe.manifest import Manifest
from vpmoe.eval.store_file import StoreFile, store_read
from vpmoe.harmony.conversation import Message
from vpmoe.hf import convert
from vpmoe.hf.source_checks import POSITIONS
from vpmoe.hf.tokenization_vpmoe import RANK_FILE
from vpmoe.tokenizer import Tokenizer
from vpmoe.tokenizer.from_dataset import vocabulary_of
from vpmoe.tokenizer.hf_directory import FILE_NAME, HFDirectory
from vpmoe.weights import megatron_checkpoint
from vpmoe.weights.geometry import load_model, process_groups
from vpmoe.weights.tensors import Weights

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel

PROMPT_ROLES = ("system", "developer")
_REMEDY = "name a run (runs/NAME), a checkpoint in it (iter_NNNNNNN), an object of a ladder, or an HF directory"


@dataclass(frozen=True)
class Opened:
    """A model, found; its weights are read when it is first used, inside of ``open_model``.

    Attributes:
        path: ``iter_NNNNNNN`` or the HF directory that the weights are of.
        name: of the run, else of the folder.
        iteration: steps that it was trained for; None where nobody says.
        weights_files: the files that hold the weights, or list their hashes.
        cfg: the run's whole configuration, or for other models a geometry; for one process.
        trained: what the run was configured with; None for other models.
        weights: every tensor, to be read.
        tokenizer: the vocabulary.
        prompts: the system and developer messages that it was trained with; None where none are on record.
        run_directory: of a run; None for other models.
        dataset: sha256 of the manifest of what its run trained on, of a blend a list; None: nobody says.
        context: tokens of a sequence that it was trained on, as its run or its config.json says; None: nobody does.
        store_sha256: of the store of vectors that its run was trained with; None: with none.
        int8: the linear layers of ``model`` have int8 weights.
        store: the file of that store, or of one that has grown from it; None: where the run had it.
        compiled: decoding steps of ``model`` are compiled.
    """

    path: Path
    name: str
    iteration: int | None
    weights_files: tuple[Path, ...]
    cfg: RunConfig
    trained: RunConfig | None
    weights: Weights
    tokenizer: Tokenizer
    prompts: tuple[Message, ...] | None
    run_directory: Path | None
    dataset: str | list[str] | None
    context: int | None
    store_sha256: str | None = None
    int8: bool = False
    store: Path | None = None
    compiled: bool = False

    @cached_property
    def store_file(self) -> StoreFile | None:
        """What ``store_read`` finds at first, which takes the hash of a file that may be large."""
        return store_read(self)

    @cached_property
    def model(self) -> VPModel:
        """Bare, in evaluation mode; raises :class:`WeightsError` for weights of another geometry, and what
        ``store_read``, ``narrow_to_int8`` and ``compile_step`` do."""
        cfg, read = self.cfg, self.store_file
        if read is not None:
            cfg = cfg.model_copy(update={"data": cfg.data.model_copy(update={"store": str(read.path)})})
        model = load_model(cfg, self.weights, source=str(self.path))
        if self.int8:
            from megatron_vpmoe.generation.int8 import narrow_to_int8

            narrow_to_int8(model)
        if self.compiled:
            from megatron_vpmoe.generation.compiled_step import compile_step

            compile_step(model)
        return model

    @property
    def described(self) -> str:
        """Which model it is, in a few words."""
        name = self.name if self.iteration is None else f"{self.name}, step {self.iteration}"
        told = {"int8 weights": self.int8, "compiled steps": self.compiled}
        return ", ".join([name, *(what for what, holds in told.items() if holds)])

    @property
    def entry(self) -> dict[str, Any]:
        """Which model it is, for a report; raises what ``store_read`` does."""
        read = self.store_file
        return {
            "run": self.name,
            "name": self.path.name,
            "iteration": self.iteration,
            "weights_sha256": sha256_of_json([sha256_of_file(file) for file in self.weights_files]),
            **({} if read is None else {"store_sha256": read.sha256}),
            **({"int8": True} if self.int8 else {}),
        }

    def require_vocabulary(self, manifest: Manifest) -> None:
        """Refuse a dataset whose ids mean something else than the model's; raises :class:`TokenizerError`."""
        ours, theirs = self.tokenizer, manifest.tokenizer
        if ours.identity != theirs.identity():
            raise TokenizerError(
                f"the model has the vocabulary {ours.name} of {ours.vocab_size} tokens, the dataset "
                f"{theirs.name} of {theirs.vocab_size}, and they differ",
                source=f"{self.path} and {manifest.path}",
                remedy="name a dataset and a model of one vocabulary",
            )
        check_vocabulary(manifest, self.cfg.model.padded_vocab_size)


@contextlib.contextmanager
def open_model(
    path: Path, *, bf16: bool | None = None, int8: bool = False, store: Path | None = None, compiled: bool = False
) -> Iterator[Opened]:
    """Find the model at ``path``, for this process alone; process groups that it starts end with the context.

    Args:
        path: a run or checkpoints directory (its newest complete checkpoint), one checkpoint, an object of a ladder
            (``megatron/`` in it), or an HF directory (ours, or a dense Qwen3).
        bf16: compute in bfloat16 or not; None: as the run did, and other models in fp32.
        int8: hold the linear layers' weights so, see :mod:`megatron_vpmoe.generation.int8`.
        store: see :func:`vpmoe.eval.store_file.store_read`.
        compiled: decode by compiled steps, see :mod:`megatron_vpmoe.generation.compiled_step`.

    Raises:
        CheckpointError: there is no such folder, nothing of a model in it, or it lacks something; names what.
        WeightsError, TokenizerError: weights or vocabulary are missing or disagree with their description.
    """
    require_folder(path)
    with process_groups():  # around all of it: processes that torchrun has started can meet only once
        if (path / "config.json").is_file():
            parts = _of_hf_directory(path, bf16)
        else:
            parts = _of_checkpoint(path / "megatron" if (path / "megatron").is_dir() else path, bf16)
        yield Opened(**parts, int8=int8, store=store, compiled=compiled)


def require_folder(path: Path) -> None:
    """Refuse a path that is no folder, before anything heavy is loaded; raises :class:`CheckpointError`."""
    if not path.is_dir():
        raise CheckpointError("there is no such model", source=str(path), remedy=_REMEDY)


def _of_hf_directory(folder: Path, bf16: bool | None) -> dict[str, Any]:
    opened = convert.open_directory(folder)
    cfg, config = opened.cfg, convert.read_config(folder)
    cfg = cfg.model_copy(update={"training": cfg.training.model_copy(update={"bf16": bool(bf16)})})
    return {
        "path": folder,
        "name": folder.name,
        "iteration": None,
        "weights_files": tuple(sorted(folder.glob("*.safetensors"))),
        "cfg": cfg,
        "trained": None,
        "weights": opened.weights,
        "tokenizer": read_tokenizer(folder, cfg.model.padded_vocab_size),
        "prompts": read_prompts(config.get("prompts"), source=str(folder / "config.json")),
        "run_directory": None,
        "dataset": (config.get("provenance") or {}).get("dataset_manifest_sha256"),
        "context": config.get(POSITIONS),
    }


def _of_checkpoint(path: Path, bf16: bool | None) -> dict[str, Any]:
    from megatron_vpmoe.training.checkpoint import ASSETS, open_checkpoint

    found = open_checkpoint(path)
    source = str(found.path / megatron_checkpoint.RUN_STATE)
    if not isinstance(found.state.get("config"), dict):
        raise CheckpointError("config is missing", source=source, remedy="choose a checkpoint that is whole")
    trained = None
    if found.state.get("kind") == "weights":  # an object of a ladder, or imported: no training made it
        cfg = megatron_checkpoint.read_config(found.path, bf16=bool(bf16))
    else:
        trained = _trained_config(found.state["config"], source)
        training = trained.training if bf16 is None else trained.training.model_copy(update={"bf16": bf16})
        cfg = trained.model_copy(update={"parallel": ParallelSection(), "training": training})
    run_directory = found.path.parent.parent if trained and found.path.parent.name == "checkpoints" else None
    return {
        "path": found.path,
        "name": trained.training.run_name if trained else path.parent.name if path.name == "megatron" else path.name,
        "iteration": found.iteration if trained else None,
        "weights_files": (found.path / "files.json",),
        "cfg": cfg,
        "trained": trained,
        "weights": megatron_checkpoint.read_weights(found.path),
        "tokenizer": read_tokenizer(found.path / ASSETS, cfg.model.padded_vocab_size),
        "prompts": read_prompts(found.state.get("prompts"), source=source),
        "run_directory": run_directory,
        "dataset": megatron_checkpoint.origin_of(found.state).get("dataset"),
        "context": trained.data.seq_length if trained else found.state.get("hf_config", {}).get(POSITIONS),
        "store_sha256": (found.state.get("provenance") or {}).get("store_sha256"),
    }


def _trained_config(stored: Any, source: str) -> RunConfig:
    try:
        return RunConfig.model_validate_json(json.dumps(stored))
    except ValidationError as error:
        raise CheckpointError(
            "the configuration in the checkpoint cannot be built: " + "; ".join(stored_faults(error)),
            source=f"{source}: config",
            remedy="open it with the code that trained it; or export it there (vpmoe hf export) and open the export",
        ) from error


def read_tokenizer(folder: Path, padded_vocab_size: int) -> Tokenizer:
    """The vocabulary whose files lie in ``folder``, the assets of a checkpoint or an HF directory.

    Raises:
        TokenizerError: there are none, or they are damaged.
    """
    if (folder / VOCABULARY).is_file():
        entry = read_vocabulary(folder / VOCABULARY)
        rank_file = folder / RANK_FILE
        return vocabulary_of(entry, folder / VOCABULARY, rank_file=rank_file if rank_file.is_file() else None)
    if (folder / FILE_NAME).is_file():
        return HFDirectory(folder, padded_vocab_size)
    raise TokenizerError(
        f"the model carries no vocabulary: neither {VOCABULARY} nor {FILE_NAME}",
        source=str(folder),
        remedy="put the files of the tokenizer there, or open a checkpoint of a run that has a dataset",
    )


def read_prompts(stored: Any, *, source: str) -> tuple[Message, ...] | None:
    """System and developer message of ``{"system": text or null, "developer": text or null}``; None for None.

    Raises:
        CheckpointError: it is something else.
    """
    if stored is None:
        return None
    if not isinstance(stored, dict) or not all(isinstance(stored.get(role), str | None) for role in PROMPT_ROLES):
        raise CheckpointError(f"prompts are {stored!r}", source=source, remedy='{"system": text, "developer": text}')
    return tuple(Message(role, stored[role]) for role in PROMPT_ROLES if stored.get(role))
