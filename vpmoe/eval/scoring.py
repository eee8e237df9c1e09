"""Judging generations: is one in valid form, and is its final message exactly the answer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vpmoe.errors import DataError
from vpmoe.eval.asking import Form, decode_in_batches
from vpmoe.eval.questions import Question
from vpmoe.eval.suites.suite_report import ALL, wilson
from vpmoe.harmony.parse import Judgement

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel
    from megatron_vpmoe.runtime.signals import StopRequest

Checker = Callable[[str, dict[str, Any]], bool]
"""``(answer, row)``: whether a text answers a row exactly."""


@dataclass(frozen=True, slots=True)
class Scored:
    """One generation and its verdict.

    Attributes:
        question: what was asked.
        ids: the generated ids, the stop token included where one came.
        judgement: the form's verdict; of Harmony the strict parser's.
        exact: the generation is valid and its final message is the answer; an answer that a reader could not pick out
            does not count.
    """

    question: Question
    ids: tuple[int, ...]
    judgement: Judgement
    exact: bool


def score(
    questions: Sequence[Question], completions: Sequence[Sequence[int]], form: Form, check: Checker
) -> list[Scored]:
    """Judge each completion of the prompt of the question at the same place.

    Raises:
        DataError: not as many completions as questions.
    """
    if len(questions) != len(completions):
        raise DataError(
            f"{len(completions)} completions of {len(questions)} questions", source="the generations to score"
        )
    scored = []
    for question, ids in zip(questions, completions, strict=True):
        judgement = form.judge(ids)
        exact = judgement.valid and judgement.final is not None and check(judgement.final, question.row)
        scored.append(Scored(question, tuple(ids), judgement, exact))
    return scored


def answer(
    model: VPModel,
    form: Form,
    questions: Sequence[Question],
    check: Checker,
    *,
    max_new_tokens: int,
    batch_size: int,
    context: int | None = None,
    label: str | None = "questions",
    stop: StopRequest | None = None,
    **draw: Any,
) -> list[Scored]:
    """Ask every question, greedily unless told otherwise, and judge the generations; a collective of all ranks.

    Args:
        model: the bare model.
        form: how to ask it.
        questions: any number of them, whose order is kept.
        check: what an exact answer is.
        max_new_tokens: a longer generation is cut.
        batch_size, context, label, stop: see :func:`vpmoe.eval.asking.decode_in_batches`.
        draw: other fields of :class:`megatron_vpmoe.generation.sampling.SamplingOptions`.
    """
    from megatron_vpmoe.generation.sampling import SamplingOptions

    if not questions:
        return []
    prompts = [form.prompt(question.query) for question in questions]
    sampling = SamplingOptions(max_new_tokens, form.stop_ids, **draw)
    completions = decode_in_batches(model, prompts, sampling, batch_size, label=label, context=context, stop=stop)
    return score(questions, completions, form, check)


def summarize(scored: Sequence[Scored]) -> dict[str, dict[str, Any]]:
    """Counts, shares and their 95 % intervals, as tasks of a report: each family, and all together.

    Returns:
        ``{family: {"accuracy", "n", "interval", "exact", "validity", "validity_interval", "valid"}, "all": {..., and
        "mean_tokens", "faults": {reason: count}}}``; shares are in 0..1.
    """
    families: dict[str, list[Scored]] = {}
    for item in scored:
        families.setdefault(item.question.family, []).append(item)
    faults = Counter(item.judgement.reason for item in scored if item.judgement.reason is not None)
    mean_tokens = sum(len(item.ids) for item in scored) / len(scored)
    return {
        **{family: _shares(families[family]) for family in sorted(families)},
        ALL: {**_shares(scored), "mean_tokens": mean_tokens, "faults": dict(faults.most_common())},
    }


def _shares(scored: Sequence[Scored]) -> dict[str, Any]:
    n = len(scored)
    valid, exact = (sum(flags) for flags in ((s.judgement.valid for s in scored), (s.exact for s in scored)))
    of_exact = {"accuracy": exact / n, "n": n, "interval": wilson(exact, n), "exact": exact}
    return {**of_exact, "validity": valid / n, "validity_interval": wilson(valid, n), "valid": valid}
