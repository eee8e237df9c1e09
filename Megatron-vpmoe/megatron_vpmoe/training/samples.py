"""Samples during training: the model answers the first prompts of the validation split, and a person can read them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_vpmoe.data.kd_dataset import KDDataset
from megatron_vpmoe.data.pieces import TokenPieces
from megatron_vpmoe.errors import DataError
from megatron_vpmoe.files import json_line, naming, read_json_lines, write_atomically
from megatron_vpmoe.generation.engine import generate
from megatron_vpmoe.generation.prompts import Prompt
from megatron_vpmoe.generation.sampling import SamplingOptions
from megatron_vpmoe.model.gpt import VPModel
from megatron_vpmoe.runtime import distributed
from megatron_vpmoe.runtime.signals import Interrupted, StopRequest
from megatron_vpmoe.turns import generation_ends

if TYPE_CHECKING:
    from megatron_vpmoe.config import RunConfig


class SampleWriter:
    """Greedy continuations of held-out prompts, appended to ``samples.jsonl`` of the run.

    The ranks share the prompts; rank 0 writes. A collective to construct.

    Args:
        dataset: the validation split.
        cfg: ``evaluation.sample_prompts`` and ``sample_max_new_tokens``.
        path: the JSONL file.
        resume_step: last step whose samples stay in the file; later ones will be written again, and a last line that
            a killed process left unfinished is dropped.

    Raises:
        DataError: an existing file holds something other than samples.
    """

    def __init__(self, dataset: KDDataset, cfg: RunConfig, path: Path, *, resume_step: int) -> None:
        self._path = path
        distributed.from_rank_0(lambda: _drop_after(path, resume_step))
        tokenizer = dataset.manifest.tokenizer
        self._pieces = TokenPieces.load(dataset.manifest)
        stops = {*generation_ends(tokenizer.special_tokens).values(), tokenizer.eod_id}
        self._options = SamplingOptions(cfg.evaluation.sample_max_new_tokens, tuple(sorted(stops)))
        count = min(cfg.evaluation.sample_prompts, len(dataset))
        self._prompts = [Prompt(dataset[index].prompt.tolist()) for index in range(count)]

    def write(self, model: VPModel, iteration: int, stop: StopRequest) -> None:
        """Generate for every prompt and append one JSON object each: step, prompt, completion (text and ids).

        Raises:
            Interrupted: a rank was asked to stop; nothing is written.
        """
        if not self._prompts:
            return
        completions = generate(model, self._prompts, self._options, stop=stop.is_requested)
        if stop.agreed():
            raise Interrupted
        if distributed.rank() != 0:
            return
        with naming(self._path), self._path.open("a", encoding="utf-8") as stream:
            for prompt, completion in zip(self._prompts, completions, strict=True):
                record = {
                    "step": iteration,
                    "prompt": self._pieces.decode(prompt.ids),
                    "completion": self._pieces.decode(completion.ids),
                    "completion_ids": completion.ids,
                }
                stream.write(json_line(record))
            stream.flush()
            os.fsync(stream.fileno())  # before a checkpoint that counts on it


def _drop_after(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for number, sample in read_json_lines(path):
        if not isinstance(sample, dict) or type(sample.get("step")) is not int:
            raise DataError(
                f"line {number} is not a sample: {str(sample)[:80]}",
                source=f"{path}:{number}",
                remedy="remove the line, or move the file away; a sample is an object with its step",
            )
        if sample["step"] <= step:
            kept.append(json_line(sample))
    write_atomically(path, "".join(kept).encode())
