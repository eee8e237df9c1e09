"""HF's model and ours on the same tokens: largest logit difference, and greedy tokens with a key-value cache."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from vpmoe.weights import megatron_checkpoint
from vpmoe.weights.geometry import config_of, load_model, process_groups


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

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    hf_folder: Path,
    checkpoint: Path,
    *,
    prompt_lengths: tuple[int, ...] = (1, 7, 33),
    greedy_steps: int = 64,
    seed: int = 1234,
) -> Parity:
    """Run both models in fp32 on prompts of random tokens, on the CPU by choice: a card rounds by its own rules.

    Args:
        hf_folder: what ``AutoModelForCausalLM`` loads.
        checkpoint: ``iter_NNNNNNN``.
        prompt_lengths: one prompt of each length; ours are decoded as one left-padded batch, HF's one by one.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    from megatron_vpmoe.generation.sampler import SamplingOptions, generate, left_padded
    from megatron_vpmoe.training.checkpoint import open_checkpoint

    logging.disable_progress_bar()
    theirs: Any = AutoModelForCausalLM.from_pretrained(
        hf_folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=True
    )
    theirs.eval()
    vocab = int(theirs.config.vocab_size)
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(0, vocab, (length,), generator=generator).tolist() for length in prompt_lengths]
    difference = scale = 0.0
    greedy: list[list[int]] = []
    found = open_checkpoint(checkpoint)
    cfg = config_of(found.state["config"], source=str(found.path))
    with process_groups(), torch.no_grad():
        ours = load_model(
            cfg, megatron_checkpoint.read_weights(found.path), source=str(found.path), device=torch.device("cpu")
        )
        for prompt in prompts:
            row = torch.tensor([prompt])
            expected = theirs(row).logits
            logits = ours(*left_padded([prompt], ours.device)).logits()[..., :vocab]
            difference = max(difference, float((logits - expected).abs().max()))
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
        answered = generate(ours, prompts, SamplingOptions(max_new_tokens=greedy_steps, stop_ids=()))
    return Parity(difference, scale, greedy_steps, answered == greedy, list(prompt_lengths))
