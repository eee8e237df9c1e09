"""A trained run opened for inference: its model from a checkpoint, and the vocabulary that it learned."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from megatron_vpmoe.config import RunConfig, config_hash
from megatron_vpmoe.config.schema_run import ParallelSection
from megatron_vpmoe.errors import CheckpointError, TokenizerError
from megatron_vpmoe.files import sha256_of_file
from vpmoe.tokenizer import Tokenizer, load_tokenizer

if TYPE_CHECKING:
    from megatron_vpmoe.data.manifest import Manifest
    from megatron_vpmoe.model.gpt import VPModel
    from megatron_vpmoe.training.checkpoint import Found


@dataclass(frozen=True)
class TrainedRun:
    """A run whose model is in memory.

    Attributes:
        cfg: the run's configuration, set to one process and to the dataset given.
        config_hash: of the configuration as it was trained.
        found: the checkpoint.
        files_sha256: hash of the checkpoint's list of files and hashes; it identifies the weights.
        model: the bare model, in evaluation mode.
        dataset: manifest of the run's dataset, the first one of a blend.
        tokenizer: the dataset's vocabulary.
    """

    cfg: RunConfig
    config_hash: str
    found: Found
    files_sha256: str
    model: VPModel
    dataset: Manifest
    tokenizer: Tokenizer

    @property
    def run_directory(self) -> Path:
        """Folder of the run: the checkpoint lies two levels below it."""
        return self.found.path.parent.parent


@contextlib.contextmanager
def open_trained(path: Path, *, data_path: Path | None = None) -> Iterator[TrainedRun]:
    """Load the model of a run in a job of one process; the process groups end with the context.

    Args:
        path: a run directory, a checkpoints directory (their newest complete checkpoint is taken) or one checkpoint.
        data_path: the built dataset; None takes the (first) one in the run's configuration.

    Raises:
        CheckpointError: no usable checkpoint there.
        DataError, TokenizerError: the dataset is missing, or is not the one that the model was trained on.
    """
    from megatron_vpmoe.training import checkpoint

    require_folder(path)
    found = checkpoint.open_checkpoint(path)
    trained = _config_of(found)
    cfg = _for_one_process(trained, data_path)
    folder = Path(cfg.data.parts[0].path)
    manifest = _check_vocabulary(found, folder)
    tokenizer = load_tokenizer(folder)

    from megatron_vpmoe.model.builder import build_model
    from megatron_vpmoe.runtime.distributed import single_process

    with single_process(cfg.training.seed):
        model = build_model(cfg)
        checkpoint.load(found, model)
        model.eval()
        yield TrainedRun(
            cfg=cfg,
            config_hash=config_hash(trained),
            found=found,
            files_sha256=sha256_of_file(found.path / "files.json"),
            model=model,
            dataset=manifest,
            tokenizer=tokenizer,
        )


def require_folder(path: Path) -> None:
    """Refuse a path that is no folder, before anything heavy is loaded; raises :class:`CheckpointError`."""
    if not path.is_dir():
        raise CheckpointError(
            "there is no such run or checkpoint",
            source=str(path),
            remedy="name a run directory (runs/NAME) or a checkpoint in it (runs/NAME/checkpoints/iter_NNNNNNN)",
        )


def _config_of(found: Found) -> RunConfig:
    try:
        return RunConfig.model_validate_json(json.dumps(found.state["config"]))
    except KeyError as error:
        raise CheckpointError(
            "the checkpoint does not say its configuration",
            source=str(found.path / "run_state.json"),
            remedy="choose a checkpoint that this version wrote",
        ) from error
    except ValidationError as error:
        keys = ", ".join(".".join(map(str, detail["loc"])) for detail in error.errors())
        raise CheckpointError(
            f"the checkpoint's configuration is not one of this version: {keys}",
            source=str(found.path / "run_state.json"),
            remedy="evaluate with the version that trained it, or train again",
        ) from error


def _for_one_process(cfg: RunConfig, data_path: Path | None) -> RunConfig:
    data = {} if data_path is None else {"data_path": str(data_path), "blend": None, "blend_schedule": None}
    return cfg.model_copy(
        update={
            "parallel": ParallelSection(),
            "data": cfg.data.model_copy(update=data),
        }
    )


def _check_vocabulary(found: Found, folder: Path) -> Manifest:
    """The dataset's manifest, after holding its vocabulary against the one that the model learned."""
    from megatron_vpmoe.data.manifest import read_manifest

    manifest = read_manifest(folder)
    trained, here = found.state["provenance"]["tokenizer"], manifest.tokenizer.identity()
    if trained != here:
        raise TokenizerError(
            f"the model was trained on the vocabulary {trained}, the dataset has {here}",
            source=str(manifest.path),
            remedy="pass --data-path with the dataset that the model was trained on",
        )
    return manifest
