"""One question to a trained run, and the conversation that came of it, for a person."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vpmoe.eval.checkpoints import open_trained
from vpmoe.eval.display import harmony_text
from vpmoe.eval.nano import stop_ids
from vpmoe.eval.questions import context_messages, prompt_ids
from vpmoe.eval.scoring import judge
from vpmoe.harmony.parse import Parser


class Draw(NamedTuple):
    """How to choose tokens, as :class:`megatron_vpmoe.generation.sampler.SamplingOptions` says."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


def print_sample(run_path: Path, question: str, draw: Draw, conversations: Path, data_path: Path | None) -> None:
    """Print prompt and generation with colours, and below them whether the generation is valid Harmony.

    Raises:
        CheckpointError, DataError, TokenizerError: something named does not exist or does not fit the rest.
    """
    from rich.console import Console

    from megatron_vpmoe.generation.sampler import SamplingOptions, generate

    with open_trained(run_path, data_path=data_path) as run:
        context = context_messages(conversations, run.dataset.root)
        (prompt,) = prompt_ids(run.tokenizer, context, [question])
        options = SamplingOptions(
            draw.max_new_tokens, stop_ids(run.tokenizer), draw.temperature, draw.top_p, seed=draw.seed
        )
        (completion,) = generate(run.model, [prompt], options)
        verdict = judge(completion, Parser(run.tokenizer))
        console = Console(highlight=False)
        console.print(harmony_text([*prompt, *completion], run.tokenizer), soft_wrap=True)
        state = "valid Harmony" if verdict.valid else f"not valid Harmony: {verdict.reason}"
        console.print(
            f"\n{len(completion)} tokens, {state} ({run.cfg.training.run_name}, step {run.found.iteration})",
            style="dim",
        )
