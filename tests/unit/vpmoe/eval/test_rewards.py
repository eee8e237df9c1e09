"""Rewards of the sidecar: valid Harmony and exact answers, by the dataset's own vocabulary, found by their names."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_vpmoe.config.schema_rollouts import RewardPart
from megatron_vpmoe.sources.rewards import Rewards, Sample
from vpmoe.eval import rewards as of_sidecar

REASONING = "<|channel|>analysis<|message|>2 and 3 is 5.<|end|><|start|>assistant"
ROW = {"synthetic_answer": "5", "exercise": "addition", "synth_id": "a"}


@pytest.fixture(autouse=True)
def of_the_tests(form: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(of_sidecar, "_form", lambda root: form)


@pytest.mark.parametrize(
    ("said", "valid", "right"),
    [
        (REASONING + "<|channel|>final<|message|>5<|return|>", 1, 1),
        (REASONING + "<|channel|>final<|message|>6<|return|>", 1, 0),
        (REASONING + "<|channel|>final<|message|>5", 0, 0),
        ("5<|return|>", 0, 0),
    ],
)
@pytest.mark.parametrize("stored", [False, True])
@pytest.mark.parametrize("of_dataset", [False, True], ids=["for generation", "of a dataset"])
def test_valid_and_exact(ids: Any, said: str, valid: int, right: int, stored: bool, of_dataset: bool) -> None:
    prompt, opening = "<|start|>user<|message|>2 + 3?<|end|>", "<|start|>assistant"
    in_prompt, in_answer = ("", opening) if of_dataset else (opening, "")
    row = {"answer_ids": ids(in_answer + REASONING + "<|channel|>final<|message|> 5 <|return|>")} if stored else ROW
    manifest: Any = SimpleNamespace(root=Path("set"))
    weights = {"exact": 1.0, "harmony": 0.1}
    rewards = Rewards([RewardPart(function=f"vpmoe.eval.rewards:{name}", weight=w) for name, w in weights.items()])
    asked, answered = ids(prompt + in_prompt), ids(in_answer + said)
    scores = rewards(Sample(asked, answered, finished=True, row=row, manifest=manifest))
    # An answer opens its message once, in the prompt or by itself.
    ill_opened = Sample(asked, ids(said if of_dataset else opening + said), finished=True, row=row, manifest=manifest)
    assert not any(rewards(ill_opened).values())
    assert scores == {"exact": right, "harmony": valid}
    assert rewards.total(scores) == pytest.approx(right + 0.1 * valid)
