"""Scoring of generations written by hand: what is valid Harmony, what is exact, and what the shares come to."""

from __future__ import annotations

import pytest

from tests.unit.vpmoe.eval.conftest import GOOD
from vpmoe.data_curation.tasks.synth_mini import check
from vpmoe.errors import DataError
from vpmoe.eval.questions import Question
from vpmoe.eval.scoring import score, summarize
from vpmoe.eval.suites.suite_report import wilson

ANALYSIS = "<|channel|>analysis<|message|>7 + 8 = 15<|end|>"
FINAL = "<|start|>assistant<|channel|>final<|message|>15<|return|>"

MALFORMED = {
    "nothing": "",
    "plain text": "15",
    "no analysis": "<|channel|>final<|message|>15<|return|>",
    "final first": f"<|channel|>final<|message|>15<|end|><|start|>assistant{ANALYSIS}",
    "never closed": f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>15",
    "final ends as a message in the middle does": f"{ANALYSIS}{FINAL.replace('<|return|>', '<|end|>')}",
    "analysis returns": "<|channel|>analysis<|message|>15<|return|>",
    "two analyses": f"{ANALYSIS}<|start|>assistant{ANALYSIS}{FINAL}",
    "unknown channel": f"<|channel|>comment<|message|>hm<|end|>{FINAL}",
    "no channel": "<|message|>15<|return|>",
    "another role": f"{ANALYSIS}{FINAL.replace('assistant', 'user')}",
    "a call": f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>15<|call|>",
    "end of document inside": f"{ANALYSIS}<|start|>assistant<|channel|>final<|message|>15<|endoftext|>",
    "goes on behind the end": f"{ANALYSIS}{FINAL}<|start|>assistant",
    "empty final": f"{ANALYSIS}{FINAL.replace('15', '')}",
    "empty analysis": f"<|channel|>analysis<|message|> <|end|>{FINAL}",
}


def question(answer: str = "15", family: str = "addition") -> Question:
    return Question({"query": "What is 7 + 8?", "exercise": family, "synthetic_answer": answer, "synth_id": "x"})


def test_good_generation_is_valid_and_exact(ids, form) -> None:
    (scored,) = score([question()], [ids(GOOD.format("15"))], form, check)
    assert scored.judgement.valid and scored.exact
    assert (scored.judgement.analysis, scored.judgement.final) == ("7 + 8 = 15", "15")


@pytest.mark.parametrize("answer", ["14", "115", "15.", "15 5", "fifteen"])
def test_wrong_answer_is_valid_and_not_exact(answer: str, ids, form) -> None:
    (scored,) = score([question()], [ids(GOOD.format(answer))], form, check)
    assert scored.judgement.valid and not scored.exact


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_is_neither_valid_nor_exact(name: str, ids, form) -> None:
    (scored,) = score([question()], [ids(MALFORMED[name])], form, check)
    assert not scored.judgement.valid and scored.judgement.reason and not scored.exact


def test_padding_id_is_a_fault_not_a_crash(ids, form, tokenizer) -> None:
    generation = ids(GOOD.format("15"))
    generation.insert(3, tokenizer.vocab_size)
    verdict = form.judge(generation)
    assert (verdict.valid, verdict.reason) == (False, "outside_vocabulary")


def test_counts_and_shares_per_family(ids, form) -> None:
    right, wrong, broken = ids(GOOD.format("15")), ids(GOOD.format("9")), ids("15")
    questions = [question(), question(), question(), question(family="sorting")]
    summary = summarize(score(questions, [right, wrong, broken, right], form, check))
    whole = summary["all"]
    assert (whole["n"], whole["valid"], whole["exact"]) == (4, 3, 2)
    assert (whole["validity"], whole["accuracy"]) == (0.75, 0.5)
    numbers = {"n": 3, "valid": 2, "validity": 2 / 3, "exact": 1, "accuracy": 1 / 3}
    assert summary["addition"] == {**numbers, "interval": wilson(1, 3), "validity_interval": wilson(2, 3)}
    assert (summary["sorting"]["accuracy"], summary["sorting"]["validity"]) == (1.0, 1.0)
    assert sum(whole["faults"].values()) == 1
    assert whole["mean_tokens"] == (3 * len(right) - 1 + len(broken)) / 4


def test_a_completion_too_few_is_an_error(ids, form) -> None:
    with pytest.raises(DataError, match="1 completions of 2 questions"):
        score([question(), question()], [ids(GOOD.format("15"))], form, check)
