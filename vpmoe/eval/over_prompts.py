"""What a model does over many prompts: how fast it continues them with its KV cache and without, and what its routers
do with what it writes.

Shapes: P prompts, L layers with experts, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.files import read_json_lines
from vpmoe.errors import DataError
from vpmoe.eval.asking import form_of, stop_ids
from vpmoe.eval.conversation import CONTEXT
from vpmoe.eval.inspection import LONGEST, given_ids, routing_of
from vpmoe.eval.pace import continued

if TYPE_CHECKING:
    from vpmoe.eval.open_model import Opened

CACHES = ("on", "off")
_GIVEN = {
    "conversation": "is asked the prompts in conversations",
    "text": "continues the prompts as they are",
    "passage": "goes on with the prompts as plain text",
}
_REMEDY = 'write a text a line, or, in a file that ends in .jsonl, {"prompt": text}'


@dataclass(frozen=True)
class OverPrompts:
    """What was measured of each prompt.

    Attributes:
        form: how the prompts were given: ``conversation``, ``text`` or ``passage``.
        tokens: int64 [P], written after each prompt.
        rate: KV cache, one of ``CACHES`` -> tokens a second, of those after the first; as many of each prompt, whether
            what is written has ended before or not: float64 [P].
        layers: numbers (from 1) of the L layers with experts; none of a dense model, and the rest is empty.
        usage: float64 [P, L, E], of the assignments of the tokens written the share that each expert got.
        first_choice: float64 [P, L], of those tokens' mixing weights the share of the heaviest expert, their mean.
        topk: experts of a token.
    """

    form: str
    tokens: NDArray[np.int64]
    rate: dict[str, NDArray[np.float64]]
    layers: list[int]
    usage: NDArray[np.float64]
    first_choice: NDArray[np.float64]
    topk: int

    def entry(self) -> dict[str, Any]:
        """For a report: of everything the mean over the prompts and the standard deviation among them."""
        experts = {
            str(layer): {"usage": _spread(self.usage[:, at]), "first_choice": _spread(self.first_choice[:, at])}
            for at, layer in enumerate(self.layers)
        }
        return {
            "form": self.form,
            "prompts": len(self.tokens),
            "tokens": int(self.tokens.sum()),
            "tokens_per_second": {cache: _spread(rate) for cache, rate in self.rate.items()},
            "experts_per_token": self.topk,
            "layers": experts,
        }


def _spread(values: NDArray[np.float64]) -> dict[str, Any]:
    return {"mean": values.mean(0).tolist(), "std": values.std(0).tolist()}


def prompts_of(path: Path) -> list[str]:
    """The prompts of a file: ``{"prompt": text}`` a line of a ``.jsonl``, else a text a line; blank lines are none.

    Raises:
        DataError: it cannot be read, holds something else, or no prompt.
    """
    if path.suffix == ".jsonl":
        rows = [*read_json_lines(path, ours=False)]
        for number, row in rows:
            if not isinstance(row, dict) or not isinstance(row.get("prompt"), str):
                raise DataError("the row has no text in prompt", source=f"{path}:{number}", remedy=_REMEDY)
        texts = [row["prompt"] for _, row in rows]
    else:
        try:
            texts = path.read_text(encoding="utf-8").split("\n")
        except (OSError, ValueError) as error:
            raise DataError(f"cannot be read: {error}", source=str(path), remedy=_REMEDY) from error
    if not (kept := [text for text in texts if text.strip()]):
        raise DataError("the file holds no prompt", source=str(path), remedy=_REMEDY)
    return kept


def measured(
    opened: Opened, prompts: Sequence[str], new_tokens: int, *, plain: bool, passage: bool, say: Callable[[str], None]
) -> OverPrompts:
    """Continue each prompt greedily, with the KV cache and without, and look into the routing of what was written.

    Args:
        opened: the model.
        prompts: texts, at least one.
        new_tokens: to write after each at most; fewer where the context ends.
        plain: give the prompts as they are, though the vocabulary knows conversations.
        passage: give them as text to go on with, an empty line behind each.
        say: told how the prompts are given.

    Raises:
        DataError: a prompt is too long.
    """
    form = form_of(opened, plain=plain, passage=passage, system=None, developer=None, say=_unsaid)
    say(_GIVEN[form.entry["form"]])
    room = min(opened.context or CONTEXT, LONGEST)
    given = [form.prompt(text) if passage else given_ids(form, text) for text in prompts]
    stops = stop_ids(opened.tokenizer)
    for text, ids in zip(prompts, given, strict=True):
        if not 0 < len(ids) < room - 1:
            raise DataError(
                f"a prompt of {len(ids):,} tokens", source=repr(text[:60]), remedy=f"1 to {room - 2:,} tokens"
            )
    continued(opened.model, given[0], 2, (), cached=True)  # what a first pass makes is no part of any rate
    rates: dict[str, list[float | None]] = {cache: [] for cache in CACHES}
    tokens, usage, first_choice, layers, topk = [], [], [], [], 0
    for ids in given:
        written: list[int] = []
        for cache in CACHES:
            budget = min(new_tokens, room - len(ids))
            done, pace = continued(opened.model, ids, budget, (), cached=cache == "on")
            rates[cache].append(pace.tokens_per_second)
            written = written or _ended(done.ids, stops)
        found = routing_of(opened.model, [*ids, *written])
        layers, tokens = [*found], [*tokens, len(written)]
        own = [(one.experts, one.chosen[len(ids) :], one.weight[len(ids) :]) for one in found.values()]
        usage.append([np.bincount(chosen.flatten(), minlength=experts) / chosen.size for experts, chosen, _ in own])
        first_choice.append([(weight[:, 0] / weight.sum(1)).mean(dtype=np.float64) for _, _, weight in own])
        topk = own[0][1].shape[1] if own else 0
    form_name = form.entry["form"]
    return OverPrompts(
        form_name,
        np.array(tokens),
        {cache: np.array(rate, np.float64) for cache, rate in rates.items()},
        layers,
        np.array(usage),
        np.array(first_choice),
        topk,
    )


def _ended(ids: list[int], stops: Collection[int]) -> list[int]:
    """As far as the first token that ends an answer, with it."""
    return ids[: 1 + next((place for place, token in enumerate(ids) if token in stops), len(ids))]


def _unsaid(line: str) -> None:
    """What is told where options would change it, and here there are none."""
