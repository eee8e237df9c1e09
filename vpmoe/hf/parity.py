"""HF's model and ours on the same tokens: largest logit difference, and greedy tokens with a key-value cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpmoe.errors import WeightsError
from vpmoe.hf import convert
from vpmoe.weights import megatron_checkpoint
from vpmoe.weights.geometry import load_model, process_groups
from vpmoe.weights.tensors import LogitDifference, random_prompts


@dataclass(frozen=True)
class Parity:
    """What was found.

    Attributes:
        logits: of ours from HF's, over HF's vocabulary.
        greedy_steps: tokens generated for each prompt on both sides, with a key-value cache.
        greedy_identical: whether all of them are equal.
    """

    logits: LogitDifference
    greedy_steps: int
    greedy_identical: bool

    def fault(self, tolerance: float) -> str | None:
        """Why they are not the same model; None if they are. ``tolerance`` as for ``LogitDifference.fault``."""
        fault = self.logits.fault(tolerance)
        if fault is None and self.greedy_identical:
            return None
        agree = "agree" if self.greedy_identical else "differ"
        return f"logits differ by {fault or f'{self.logits.largest:.2e}'}, greedy tokens {agree}"

    def as_json(self) -> dict[str, Any]:
        """For a receipt."""
        greedy = {"greedy_steps": self.greedy_steps, "greedy_identical": self.greedy_identical}
        return {**self.logits.as_json(), **greedy}


def compare(
    hf_folder: Path,
    checkpoint: Path,
    *,
    prompt_lengths: tuple[int, ...] = (1, 7, 33),
    greedy_steps: int = 64,
    seed: int = 1234,
    trust_remote_code: bool = False,
) -> Parity:
    """Run both models in fp32 on prompts of random tokens, on the CPU by choice: a card rounds by its own rules.

    Args:
        hf_folder: what ``AutoModelForCausalLM`` loads.
        checkpoint: ``iter_NNNNNNN``.
        prompt_lengths: one prompt of each length; ours are decoded as one batch, HF's one by one.
        trust_remote_code: run the code that lies in the directory, instead of ours or transformers' own.

    Raises:
        WeightsError: no directory of a model that we know, or weights that are not what its configuration says.
        NonFiniteError: a weight or a logit is nan or infinite.
    """
    from megatron_vpmoe.generation.engine import generate
    from megatron_vpmoe.generation.prompts import Prompt
    from megatron_vpmoe.generation.sampling import SamplingOptions
    from megatron_vpmoe.model.attention.masks import left_padded
    from megatron_vpmoe.training.checkpoint import open_checkpoint

    found = open_checkpoint(checkpoint)
    cfg = megatron_checkpoint.read_config(found.path)
    opened = convert.open_directory(hf_folder, cfg=cfg)
    for tensor in opened.weights.values():
        tensor.read()  # a nan is found here, with its tensor's name
    with _said_by_transformers(opened.folder):
        theirs = _open_hf(opened, trust_remote_code)
    vocab = opened.carried.vocab_size
    prompts = random_prompts(vocab, prompt_lengths, seed)
    before: list[torch.Tensor] = []
    after: list[torch.Tensor] = []
    greedy: list[list[int]] = []
    with process_groups(), torch.no_grad():
        ours = load_model(
            cfg, megatron_checkpoint.read_weights(found.path), source=str(found.path), device=torch.device("cpu")
        )
        for prompt in prompts:
            row = torch.tensor([prompt])
            after.append(ours(*left_padded([prompt], ours.device)).logits()[0, :, :vocab])
            with _said_by_transformers(opened.folder):
                before.append(theirs(row).logits[0])
                continued = theirs.generate(
                    row,
                    attention_mask=torch.ones_like(row),
                    max_new_tokens=greedy_steps,
                    min_new_tokens=greedy_steps,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=0,
                    eos_token_id=None,
                    repetition_penalty=1.0,
                )
            greedy.append(continued[0, len(prompt) :].tolist())
        options = SamplingOptions(max_new_tokens=greedy_steps, stop_ids=())
        answered = [one.ids for one in generate(ours, [Prompt(prompt) for prompt in prompts], options)]
    return Parity(LogitDifference.between(before, after), greedy_steps, answered == greedy)


def _open_hf(opened: convert.HFModel, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from vpmoe.hf.modeling_vpmoe import VpMoeForCausalLM

    ours = opened.form is convert.student and not trust_remote_code
    model: Any = VpMoeForCausalLM if ours else AutoModelForCausalLM
    logging.disable_progress_bar()
    return model.from_pretrained(
        opened.folder,
        dtype=torch.float32,
        attn_implementation="eager",
        local_files_only=True,
        trust_remote_code=trust_remote_code,
    ).eval()


@contextlib.contextmanager
def _said_by_transformers(folder: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # whatever it raises for what is wrong beyond geometry and weights
        raise WeightsError(
            f"transformers cannot load or run it: {type(error).__name__}: {error}",
            source=str(folder),
            remedy="correct its config.json, or fetch or export the directory again",
        ) from error
