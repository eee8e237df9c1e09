"""Rung 1: HF's Qwen3 becomes a Megatron checkpoint, and the export gives HF's directory back.

The receipt holds the largest logit difference between the two models in fp32, whether 64 greedy tokens are the same on
both sides with a key-value cache, and whether importing the export gives the same bits.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field

from vpmoe.errors import UpcycleError
from vpmoe.hf.convert import open_directory, run_state
from vpmoe.hf.parity import compare
from vpmoe.upcycle.inputs import checkpoint_of
from vpmoe.upcycle.job import DrawingSettings, Job, Product, Task
from vpmoe.upcycle.rung_below import refuse_changed
from vpmoe.weights import megatron_checkpoint
from vpmoe.weights.tensors import DTYPES


class ImportQwen3Settings(DrawingSettings):
    """Settings of ``import_qwen3``."""

    prompt_lengths: tuple[int, ...] = (1, 7, 33)
    """Lengths of the prompts (of random tokens) that both models read."""
    greedy_steps: int = Field(default=64, ge=1)
    """Tokens that both continue them by."""
    logit_tolerance: float = Field(default=1e-4, gt=0)
    """Largest allowed logit difference in fp32, relative to the largest logit where that is above 1."""


class ImportQwen3(Job[ImportQwen3Settings]):
    """``source`` (an HF directory) -> rung 1."""

    name: ClassVar[str] = "import_qwen3"
    roles: ClassVar[tuple[str, ...]] = ("source",)
    settings_type = ImportQwen3Settings

    def convert(self, task: Task[ImportQwen3Settings]) -> Product:
        source = task.inputs["source"]
        model = open_directory(source.hf, cfg=task.cfg, dtype=DTYPES[task.settings.dtype])
        size = model.carried.vocab_size
        task.report.update(vocab_size=size, padding_rows=task.cfg.model.padded_vocab_size - size)
        return Product(model.weights, run_state(model.cfg, model.carried), model.assets)

    def verify(self, task: Task[ImportQwen3Settings], folder: Path) -> dict[str, Any]:
        checkpoint = checkpoint_of(folder)
        again = open_directory(folder / "hf", cfg=task.cfg).weights
        here = megatron_checkpoint.read_weights(checkpoint)
        refuse_changed(task, here, again, {name: name for name in here}, what="the export gives another one back")
        # Weights are compared as they are written; a cast to bf16 on the way would not be the conversion's fault.
        source = task.inputs["source"].hf if task.settings.dtype == "keep" else folder / "hf"
        settings = task.settings
        found = compare(
            source,
            checkpoint,
            prompt_lengths=settings.prompt_lengths,
            greedy_steps=settings.greedy_steps,
            seed=settings.seed,
        )
        if fault := found.fault(settings.logit_tolerance):
            raise UpcycleError(
                f"not the same model: {fault}",
                source=task.spec.id,
                remedy="the conversion is wrong, or the directory is no plain Qwen3",
            )
        return {"parity": found.as_json(), "reimport_bit_identical": True}
