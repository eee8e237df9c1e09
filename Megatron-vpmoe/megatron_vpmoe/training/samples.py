"""Samples during training: the model answers the first prompts of the validation split, and a person can read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.data.pieces import TokenPieces
from megatron_vpmoe.generation.sampler import SamplingOptions, generate
from megatron_vpmoe.model.gpt import VPModel

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig

_ENDS_OF_MESSAGES = ("<|return|>", "<|call|>")


class SampleWriter:
    """Greedy continuations of held-out prompts, appended to ``samples.jsonl`` of the run.

    Every rank generates the same (expert-parallel ranks exchange tokens); rank 0 writes.

    Args:
        dataset: the validation split.
        cfg: ``evaluation.sample_prompts`` and ``sample_max_new_tokens``.
        path: the JSONL file.
        resume_step: last step whose samples stay in the file; later ones will be written again.
    """

    def __init__(self, dataset: KDDataset, cfg: RunConfig, path: Path, *, resume_step: int) -> None:
        self._path = path
        self._resume_step: int | None = resume_step
        tokenizer = dataset.manifest.tokenizer
        self._pieces = TokenPieces.load(dataset.manifest)
        # A vocabulary of plain text has no tokens that end a message.
        ends = [tokenizer.special_tokens[name] for name in _ENDS_OF_MESSAGES if name in tokenizer.special_tokens]
        self._options = SamplingOptions(cfg.evaluation.sample_max_new_tokens, (*ends, tokenizer.eod_id))
        count = min(cfg.evaluation.sample_prompts, len(dataset))
        self._prompts = [dataset[index].prompt.tolist() for index in range(count)]

    def write(self, model: VPModel, iteration: int, *, is_writer: bool) -> None:
        """Generate for every prompt and append one JSON object each: step, prompt, completion (text and ids)."""
        if not self._prompts:
            return
        completions = generate(model, self._prompts, self._options)
        if not is_writer:
            return
        if self._resume_step is not None:
            _drop_after(self._path, self._resume_step)
            self._resume_step = None
        with self._path.open("a") as stream:
            for prompt, completion in zip(self._prompts, completions, strict=True):
                record = {
                    "step": iteration,
                    "prompt": self._pieces.decode(prompt),
                    "completion": self._pieces.decode(completion),
                    "completion_ids": completion,
                }
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def _drop_after(path: Path, step: int) -> None:
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if json.loads(line)["step"] <= step]
        partial = path.with_suffix(".partial")
        partial.write_text("".join(f"{line}\n" for line in kept))
        partial.replace(path)
