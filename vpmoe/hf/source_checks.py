"""An HF directory is what it says, or nothing is made of it: configuration, tensors and tokenizer agree."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, TypeVar

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from megatron_vpmoe.config import RunConfig, stored_faults
from megatron_vpmoe.data.vocabulary_files import VOCABULARY, read_vocabulary
from vpmoe.errors import TokenizerError, WeightsError
from vpmoe.tokenizer.hf_directory import FILE_NAME, read_tokenizer
from vpmoe.weights.geometry import expected_shapes
from vpmoe.weights.tensors import LazyTensor, Weights, check_geometry

EMBEDDING = "model.embed_tokens.weight"
OUTPUT = "lm_head.weight"
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


POSITIONS = "max_position_embeddings"
"""Key of ``config.json``: tokens of a sequence that a model was trained on."""


class HFConfig(BaseModel):
    """What we read of any ``config.json``; a form's own fields are a subclass's."""

    model_config = ConfigDict(strict=True, frozen=True, allow_inf_nan=False)

    vocab_size: int = Field(ge=1)
    tie_word_embeddings: bool = False
    max_position_embeddings: int | None = Field(None, ge=1)
    prompts: dict[Literal["system", "developer"], str | None] | None = None


Form = TypeVar("Form", bound=HFConfig)


def validated(form: type[Form], config: Mapping[str, Any], *, source: str) -> Form:
    """A ``config.json`` as its schema.

    Raises:
        WeightsError: keys are missing or of another type; names all of them.
    """
    try:
        return form.model_validate(config)
    except ValidationError as error:
        raise WeightsError(
            "this configuration describes no model that can be read:\n    " + "\n    ".join(stored_faults(error)),
            source=source,
            remedy="name a dense Qwen3 (silu, no biases or windows, plain RoPE), or what was written or exported here",
        ) from error


def check_layers(config: Mapping[str, Any], weights: Weights, *, source: str) -> None:
    """Hold the number of layers to those of the tensors' names, before anything is built of it."""
    held, told = {match[1] for match in map(_LAYER.match, weights) if match}, config.get("num_hidden_layers")
    if isinstance(told, int) and told != len(held):
        raise WeightsError(
            f"num_hidden_layers is {told}, and the weights hold {len(held)} layers",
            source=source,
            remedy="correct config.json, or name a complete directory",
        )


def check_tensors(weights: Weights, form: ModuleType, cfg: RunConfig, vocab_size: int, *, source: str) -> None:
    """Hold an HF directory's tensors, under HF's names, to what its configuration describes.

    Args:
        form: ``qwen3`` or ``student``.
        cfg: our geometry of it; its embedding may be padded.
        vocab_size: rows of HF's embedding.

    Raises:
        WeightsError: a tensor is missing, surplus, of another shape or of integers; the model is tied and has an output
            layer of its own that differs; or the embedding is padded to fewer rows than HF's.
    """
    if (rows := cfg.model.padded_vocab_size) < vocab_size:
        raise WeightsError(
            f"padded_vocab_size {rows} is below the model's {vocab_size} rows",
            source=source,
            remedy=f"pad to {vocab_size} or more",
        )
    ours = {name: LazyTensor(shape, torch.float32, _nothing) for name, shape in expected_shapes(cfg).items()}
    theirs = form.from_megatron(ours, cfg, vocab_size=vocab_size)
    expected = {name: tensor.shape for name, tensor in theirs.items()}
    if own_output := OUTPUT in weights and OUTPUT not in expected:
        expected[OUTPUT] = expected[EMBEDDING]
    check_geometry(weights, expected, source=source)
    if integers := [
        f"{name}: {tensor.dtype}" for name, tensor in weights.items() if not tensor.dtype.is_floating_point
    ]:
        raise WeightsError(
            f"weights of integers, {integers[0]}",
            source=source,
            remedy="quantised weights are not read: name the model's own, in bfloat16 or float32",
        )
    if own_output and not torch.equal(weights[OUTPUT].read(), weights[EMBEDDING].read()):
        raise WeightsError(
            "the configuration ties embedding and output layer, and the weights hold two that differ",
            source=source,
            remedy="set tie_word_embeddings to false in config.json, or remove lm_head.weight",
        )


def _nothing() -> Tensor:
    raise AssertionError("only shapes are known")


def check_tokenizer(folder: Path, rows: int) -> None:
    """Hold the tokenizer that lies in an HF directory, if one does, to the rows of its embedding.

    Raises:
        TokenizerError: it cannot be read, or has ids that have no row.
    """
    if (folder / VOCABULARY).is_file():
        source = folder / VOCABULARY
        highest = read_vocabulary(source).vocab_size - 1
    elif (folder / FILE_NAME).is_file():
        source = folder / FILE_NAME
        highest = max(read_tokenizer(folder)[1].values(), default=-1)
    else:
        return
    if highest >= rows:
        raise TokenizerError(
            f"it has ids up to {highest}, and the embedding {rows} rows",
            source=str(source),
            remedy="put the tokenizer there that the model was trained with",
        )
