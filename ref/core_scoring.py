"""CORE's rules for one item, one option at a time: whole passes, no cache, no batch. Slow, and meant to be obvious.

Written from the rules as they are published (DCLM, arXiv 2406.11794, appendix G; and the public harnesses' prompts):

- examples, then the item, with one blank line between; a question and its answer with the task's delimiter between;
- the text is encoded as a whole behind one token that begins a document;
- multiple choice: the tokens from the first at which the options differ; schema: those that all options end with;
  language modelling: those behind the prompt without its answer and without blanks at its end;
- a sequence longer than the context keeps its end;
- the option with the largest mean log-likelihood is chosen; language modelling is right where each token is the argmax.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def score_item(
    kind: str,
    item: dict[str, Any],
    shots: Sequence[dict[str, Any]],
    delimiter: str,
    *,
    encode: Callable[[str], list[int]],
    first: int,
    logits_of: Callable[[list[int]], Tensor],
    context: int | None = None,
) -> dict[str, Any]:
    """``chosen``, ``correct``, and the mean log-likelihood of each option, ``log_likelihoods``.

    Args:
        kind: multiple_choice, schema or language_modeling.
        item: as in the bundle.
        shots: solved examples.
        delimiter: before an answer.
        encode: token ids of a text.
        first: the token that every sequence begins with.
        logits_of: [S, V] of S token ids.
        context: tokens of a sequence at most.
    """
    prompt = ""
    for shot in shots:
        if kind == "multiple_choice":
            prompt += shot["query"] + delimiter + shot["choices"][shot["gold"]] + "\n\n"
        elif kind == "schema":
            prompt += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"] + "\n\n"
        else:
            prompt += shot["context"].strip() + delimiter + shot["continuation"] + "\n\n"
    if kind == "multiple_choice":
        texts = [prompt + item["query"] + delimiter + choice for choice in item["choices"]]
    elif kind == "schema":
        texts = [prompt + option + delimiter + item["continuation"] for option in item["context_options"]]
    else:
        texts = [prompt + item["context"].strip() + delimiter + item["continuation"]]
    sequences = [[first, *encode(text)] for text in texts]

    if kind == "multiple_choice":
        begin = 0
        while all(len(ids) > begin and ids[begin] == sequences[0][begin] for ids in sequences):
            begin += 1
        begins = [min(begin, min(len(ids) for ids in sequences) - 1)] * len(sequences)
    elif kind == "schema":
        same = 0
        while all(len(ids) > same + 1 and ids[-1 - same] == sequences[0][-1 - same] for ids in sequences):
            same += 1
        begins = [len(ids) - same for ids in sequences]
    else:
        without = [first, *encode((prompt + item["context"].strip() + delimiter).strip())]
        assert sequences[0][: len(without)] == without, "the prompt's tokens are not the beginning of the whole's"
        begins = [len(without)]

    means, greedy = [], True
    for ids, begin in zip(sequences, begins, strict=True):
        if context is not None and len(ids) > context:
            begin = max(1, begin - (len(ids) - context))
            ids = ids[-context:]
        log_p = torch.log_softmax(logits_of(ids).double(), dim=-1)
        total = 0.0
        for place in range(begin, len(ids)):
            total += float(log_p[place - 1, ids[place]])
            greedy = greedy and int(log_p[place - 1].argmax()) == ids[place]
        means.append(total / (len(ids) - begin))
    if kind == "language_modeling":
        return {"chosen": None, "correct": greedy, "log_likelihoods": means}
    chosen = max(range(len(means)), key=lambda option: means[option])
    return {"chosen": chosen, "correct": chosen == item["gold"], "log_likelihoods": means}
