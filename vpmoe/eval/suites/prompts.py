"""An item of a CORE task as text, and as the token ids whose likelihood decides it.

A text is encoded as a whole, never a question and an answer apart: the blank before an answer then belongs to the token
that it belongs to in any text (`` signs``, not `` `` and ``signs``). What is scored begins where the ids of the options
part, or, with one continuation, where the ids with it part from those without it and without the blank before it. So
the vocabulary decides where an answer begins: o200k, Qwen's and compact vocabularies give each their own ids, and the
same text. Every sequence begins with ``<|endoftext|>``, the only token that all vocabularies end a document with; it is
never scored, and gives a text's first token something to stand behind.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from vpmoe.eval.suites.bundle import Item, Task
from vpmoe.eval.suites.likelihoods import Request
from vpmoe.tokenizer import Tokenizer

_BETWEEN = "\n\n"  # examples


@dataclass(frozen=True)
class Asked:
    """An item, ready to be scored.

    Attributes:
        requests: one an option; of language modelling one alone, whose tokens have all to be the likeliest.
        gold: the right option; None for language modelling.
        cut: a sequence was longer than the context, and lost its beginning.
    """

    requests: tuple[Request, ...]
    gold: int | None
    cut: bool


def texts_of(task: Task, item: Item, shots: Sequence[Item]) -> list[str]:
    """The item's texts behind its examples: one an option; of language modelling the text without what is to follow,
    then with it."""
    before = "".join(_solved(task, shot) + _BETWEEN for shot in shots)
    if task.kind == "multiple_choice":
        return [f"{before}{item['query']}{task.delimiter}{choice}" for choice in item["choices"]]
    if task.kind == "schema":
        return [f"{before}{option}{task.delimiter}{item['continuation']}" for option in item["context_options"]]
    start = f"{before}{item['context'].strip()}{task.delimiter}"
    return [start.strip(), f"{start}{item['continuation']}"]


def _solved(task: Task, item: Item) -> str:
    if task.kind == "multiple_choice":
        return f"{item['query']}{task.delimiter}{item['choices'][item['gold']]}"
    if task.kind == "schema":
        return f"{item['context_options'][item['gold']]}{task.delimiter}{item['continuation']}"
    return f"{item['context'].strip()}{task.delimiter}{item['continuation']}"


def ask(task: Task, item: Item, shots: Sequence[Item], tokenizer: Tokenizer, context: int | None) -> Asked:
    """An item as sequences of at most ``context`` tokens; a longer one loses its beginning.

    Raises:
        TokenizerError: a text has no form in the vocabulary.
    """
    sequences = [[tokenizer.eod_id, *tokenizer.encode_ordinary(text).tolist()] for text in texts_of(task, item, shots)]
    shortest = min(map(len, sequences))
    parting = _common(sequences)
    if task.kind == "language_modeling":
        sequences = sequences[1:]
        shortest = len(sequences[0])
    # An option that is the beginning of another still has a last token of its own to be scored.
    parting = min(parting, shortest - 1)
    scored = [len(ids) - parting for ids in sequences]
    if task.kind == "schema":
        same = min(max(1, _common([ids[::-1] for ids in sequences])), shortest - 1)
        scored = [same] * len(sequences)
        parting = min(parting, shortest - same)
    requests = tuple(Request.of(ids, parting, last, context) for ids, last in zip(sequences, scored, strict=True))
    cut = context is not None and any(len(ids) > context for ids in sequences)
    return Asked(requests, item.get("gold") if task.kind != "language_modeling" else None, cut)


def _common(sequences: Sequence[Sequence[int]]) -> int:
    """Ids that all begin with."""
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*sequences, strict=False)))
