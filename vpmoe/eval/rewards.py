"""Rewards for training: is an answer in valid Harmony, and is its final message exactly the stored answer's.

rollouts: {rewards: [{function: "vpmoe.eval.rewards:exact"}, {function: "vpmoe.eval.rewards:harmony", weight: 0.1}]}
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from vpmoe.data_curation.tasks.synth_mini import check
from vpmoe.eval.asking import AsConversation
from vpmoe.tokenizer.from_dataset import load_tokenizer

if TYPE_CHECKING:
    from megatron_vpmoe.sources.rewards import Sample


def harmony(sample: Sample) -> float:
    """1 where the strict parser takes the answer, else 0."""
    return float(_form(sample.manifest.root).judge(sample.ids).valid)


def exact(sample: Sample) -> float:
    """1 where the answer is valid and its final message is the right one, else 0.

    Right is what the row's ``synthetic_answer`` says; of a dataset's prompt, the stored answer's final message.
    """
    form = _form(sample.manifest.root)
    said = form.judge(sample.ids)
    if not said.valid or said.final is None:
        return 0.0
    if "answer_ids" not in sample.row:
        return float(check(said.final, dict(sample.row)))
    stored = form.judge(sample.row["answer_ids"]).final
    return float(stored is not None and said.final.strip() == stored.strip())


@lru_cache(maxsize=4)
def _form(root: Path) -> AsConversation:
    return AsConversation(load_tokenizer(root))
