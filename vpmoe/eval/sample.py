"""One question to any model, and what came of it, for a person."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpmoe.errors import DataError
from vpmoe.eval.asking import AsConversation, form_of
from vpmoe.eval.display import harmony_text, spell
from vpmoe.eval.inspection import mixed_experts, weights_of
from vpmoe.eval.open_model import open_model
from vpmoe.eval.store_file import remembering


def print_sample(
    where: Path,
    question: str,
    draw: Mapping[str, Any],
    *,
    plain: bool = False,
    passage: bool = False,
    system: str | None,
    developer: str | None,
    only_valid: bool = False,
    logprobs: bool = False,
    routing: bool = False,
    int8: bool = False,
    store: Path | None = None,
    remember: Path | None = None,
    compiled: bool = False,
) -> None:
    """Print prompt and generation with colours, and below them whether the generation is valid.

    Args:
        where: as :func:`vpmoe.eval.open_model.open_model` takes it.
        question: what the user asks.
        draw: fields of :class:`megatron_vpmoe.generation.sampling.SamplingOptions`, but for ``stop_ids``.
        plain: see :func:`vpmoe.eval.asking.form_of`, as for the messages.
        passage: likewise.
        only_valid: nothing but valid Harmony can be chosen.
        logprobs: print each token's log-probabilities too, the model's own and that of the draw.
        routing: print the weights of a mixture's experts too, by which each token was written.
        int8: see :func:`vpmoe.eval.open_model.open_model`, as for ``store`` and ``compiled``.
        store: likewise.
        remember: see :func:`vpmoe.eval.store_file.remembering`; takes in what has ended by itself.
        compiled: likewise.

    Raises:
        CheckpointError, WeightsError, TokenizerError: no model there, or it lacks something.
        DataError: the prompt is longer than what the model was trained on; routing is asked for of no mixture.
    """
    from rich.console import Console

    from megatron_vpmoe.generation.engine import generate
    from megatron_vpmoe.generation.grammar import TokenGrammar
    from megatron_vpmoe.generation.prompts import Prompt
    from megatron_vpmoe.generation.sampling import SamplingOptions

    console, notes = Console(highlight=False), Console(stderr=True, highlight=False)
    found_as = open_model(where, int8=int8, store=store, compiled=compiled)
    with found_as as found, remembering(found, remember) as (opened, keep):
        form = form_of(
            opened,
            plain=plain,
            passage=passage,
            system=system,
            developer=developer,
            say=lambda line: notes.print(line, style="dim", markup=False, soft_wrap=True),
        )
        prompt = form.prompt(question)
        if opened.context is not None and len(prompt) > opened.context:
            raise DataError(
                f"the prompt has {len(prompt):,} tokens, and the model was trained on {opened.context:,}",
                source="QUESTION and the messages before it",
                remedy="ask a shorter question; vpmoe chat --context takes a longer one on your word",
            )
        options = SamplingOptions(stop_ids=form.stop_ids, **draw)
        grammar = TokenGrammar(*form.automaton) if only_valid else None
        experts = mixed_experts(opened.model) if routing else ()
        if routing and not experts:
            raise DataError(
                f"{opened.described} mixes no experts by weights",
                source="--routing",
                remedy="leave it out; the app's routing inspector shows which experts a layer chooses",
            )
        for completion in generate(opened.model, [Prompt(prompt)], options, grammar=grammar, record_routing=routing):
            verdict = form.judge(completion.ids)
            console.print(harmony_text([*prompt, *completion.ids], opened.tokenizer), soft_wrap=True)
            for token, own, drawn in zip(completion.ids, completion.untempered, completion.as_sampled, strict=True):
                if logprobs:
                    console.print(f"{own:9.4f} {drawn:9.4f}  {spell([token], opened.tokenizer)!r}", markup=False)
            if routing:
                console.print("  ".join(experts), style="dim", markup=False)
                for token, weights in zip(completion.ids, weights_of(completion), strict=True):
                    shares = "  ".join(f"{w:{len(name)}.3f}" for name, w in zip(experts, weights, strict=True))
                    console.print(f"{shares}  {spell([token], opened.tokenizer)!r}", markup=False)
            name = "valid Harmony" if isinstance(form, AsConversation) else "ended by itself"
            state = name if verdict.valid else f"not {name}: {verdict.reason}"
            told = f"\n{len(completion.ids)} tokens, {state} ({opened.described})"
            console.print(told, style="dim", markup=False, soft_wrap=True)
            if keep is not None:
                ended = completion.finish == "stop"
                kept = keep([*prompt, *completion.ids]) if ended else f"{remember}: what was cut is not added"
                notes.print(kept, style="dim", markup=False, soft_wrap=True)
