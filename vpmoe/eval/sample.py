"""One question to any model, and what came of it, for a person."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from vpmoe.eval.asking import AsConversation, form_of
from vpmoe.eval.display import harmony_text
from vpmoe.eval.open_model import open_model


class Draw(NamedTuple):
    """How to choose tokens, as :class:`megatron_vpmoe.generation.sampling.SamplingOptions` says."""

    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int


def print_sample(
    where: Path, question: str, draw: Draw, *, plain: bool = False, system: str | None, developer: str | None
) -> None:
    """Print prompt and generation with colours, and below them whether the generation is valid.

    Args:
        where: as :func:`vpmoe.eval.open_model.open_model` takes it.
        question: what the user asks.
        draw: how to choose tokens.
        plain: see :func:`vpmoe.eval.asking.form_of`, as for the messages.

    Raises:
        CheckpointError, WeightsError, TokenizerError: no model there, or it lacks something.
    """
    from rich.console import Console

    from megatron_vpmoe.generation.engine import generate
    from megatron_vpmoe.generation.prompts import Prompt
    from megatron_vpmoe.generation.sampling import SamplingOptions

    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    with open_model(where) as opened:
        form = form_of(
            opened,
            plain=plain,
            system=system,
            developer=developer,
            say=lambda line: notes.print(line, style="dim", markup=False, soft_wrap=True),
        )
        prompt = form.prompt(question)
        options = SamplingOptions(draw.max_new_tokens, form.stop_ids, draw.temperature, draw.top_p, seed=draw.seed)
        completion = generate(opened.model, [Prompt(prompt)], options)[0].ids
        verdict = form.judge(completion)
        console.print(harmony_text([*prompt, *completion], opened.tokenizer), soft_wrap=True)
        name = "valid Harmony" if isinstance(form, AsConversation) else "ended by itself"
        state = name if verdict.valid else f"not {name}: {verdict.reason}"
        console.print(
            f"\n{len(completion)} tokens, {state} ({opened.described})", style="dim", markup=False, soft_wrap=True
        )
