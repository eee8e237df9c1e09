"""Rewards for training: is an answer in valid Harmony, and is its final message exactly the stored answer's.

rollouts: {rewards: [{function: "vpmoe.eval.rewards:exact"}, {function: "vpmoe.eval.rewards:harmony", weight: 0.1}]}
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vpmoe.data_curation.tasks.synth_mini import check
from vpmoe.eval.asking import AsConversation
from vpmoe.harmony.parse import Judgement
from vpmoe.tokenizer.from_dataset import load_tokenizer

if TYPE_CHECKING:
    from megatron_vpmoe.sources.rewards import Sample


def harmony(sample: Sample) -> float:
    """1 where the strict parser takes the answer, else 0."""
    return float(_judged(sample, sample.ids).valid)


def exact(sample: Sample) -> float:
    """1 where the answer is valid and its final message is the right one, else 0.

    Right is what the row's ``synthetic_answer`` says; of a dataset's prompt, the stored answer's final message.
    """
    said = _judged(sample, sample.ids)
    if not said.valid or said.final is None:
        return 0.0
    if "answer_ids" not in sample.row:
        return float(check(said.final, dict(sample.row)))
    stored = _judged(sample, sample.row["answer_ids"]).final
    return float(stored is not None and said.final.strip() == stored.strip())


def _judged(sample: Sample, answer_ids: Sequence[int]) -> Judgement:
    """The verdict on an answer to the sample's prompt.

    A dataset's prompt ends with the user's message: its answers begin with the <|start|>assistant that a prompt
    rendered for generation ends with.
    """
    form = _form(sample.manifest.root)
    opening, prompt, answer = form.opening, list(sample.prompt_ids), list(answer_ids)
    if prompt[-len(opening) :] == opening:
        return form.judge(answer)
    if answer[: len(opening)] != opening:
        return Judgement(False, "no_message", None, None)
    return form.judge(answer[len(opening) :])


@lru_cache(maxsize=4)
def _form(root: Path) -> AsConversation:
    return AsConversation(load_tokenizer(root))
