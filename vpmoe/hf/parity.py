"""HF's model and ours on the same tokens: largest logit difference, and greedy tokens with a key-value cache."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from vpmoe.errors import WeightsError
from vpmoe.hf import convert
from vpmoe.weights import megatron_checkpoint
from vpmoe.weights.geometry import config_of, load_model, process_groups
from vpmoe.weights.tensors import largest_difference


@dataclass(frozen=True)
class Parity:
    """What was found.

    Attributes:
        logit_difference: largest absolute one over all positions and HF's vocabulary, fp32.
        logit_scale: largest absolute logit of HF's, for comparison.
        greedy_steps: tokens generated for each prompt on both sides, with a key-value cache.
        greedy_identical: whether all of them are equal.
        prompts: lengths of the prompts, in tokens.
    """

    logit_difference: float
    logit_scale: float
    greedy_steps: int
    greedy_identical: bool
    prompts: list[int]

    def fault(self, tolerance: float) -> str | None:
        """Why they are not the same model; None if they are.

        Args:
            tolerance: largest allowed logit difference, relative to the largest logit where that is above 1.
        """
        bound = tolerance * max(1.0, self.logit_scale)
        if self.logit_difference <= bound and self.greedy_identical:
            return None
        agree = "agree" if self.greedy_identical else "differ"
        return f"logits differ by {self.logit_difference:.2e} (allowed {bound:.2e}), greedy tokens {agree}"


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
    cfg = config_of(found.state["config"], source=str(found.path))
    opened = convert.open_directory(hf_folder, cfg=cfg)
    for tensor in opened.weights.values():
        tensor.read()  # a nan is found here, with its tensor's name
    theirs = _open_hf(opened, trust_remote_code)
    vocab = opened.carried.vocab_size
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in prompt_lengths]
    difference = scale = 0.0
    greedy: list[list[int]] = []
    with process_groups(), torch.no_grad():
        ours = load_model(
            cfg, megatron_checkpoint.read_weights(found.path), source=str(found.path), device=torch.device("cpu")
        )
        for prompt in prompts:
            row = torch.tensor([prompt])
            expected = theirs(row).logits
            logits = ours(*left_padded([prompt], ours.device)).logits()[..., :vocab]
            difference = max(difference, largest_difference(expected, logits))
            scale = max(scale, float(expected.abs().max()))
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
    return Parity(difference, scale, greedy_steps, answered == greedy, list(prompt_lengths))


def _open_hf(opened: convert.HFModel, trust_remote_code: bool) -> Any:
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from vpmoe.hf.modeling_vpmoe import VpMoeForCausalLM

    ours = opened.form is convert.student and not trust_remote_code
    model: Any = VpMoeForCausalLM if ours else AutoModelForCausalLM
    logging.disable_progress_bar()
    try:
        return model.from_pretrained(
            opened.folder,
            dtype=torch.float32,
            attn_implementation="eager",
            local_files_only=True,
            trust_remote_code=trust_remote_code,
        ).eval()
    except Exception as error:  # whatever transformers raises for what is wrong beyond geometry and weights
        raise WeightsError(
            f"transformers cannot load it: {type(error).__name__}: {error}",
            source=str(opened.folder),
            remedy="correct its config.json, or fetch or export the directory again",
        ) from error
