"""What every rung is asked: how likely it finds held-out texts, and whether it answers held-out questions.

The same texts and questions at every rung, whatever the vocabulary; losses as ``eval.suites.likelihood`` has them. A
question is asked as the texts ask it (``data_curation.tasks.question_texts``) and answered greedily with a
key-value cache; the answer is the first line, and has to be the expected one, blanks around it apart. What
conversations have taught is asked the same questions as conversations besides: the answer is the final channel's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_vpmoe.files import sha256_of_file, sha256_of_json
from vpmoe.eval.asking import AsConversation, AsText, Form, decode_in_batches
from vpmoe.eval.open_model import open_model
from vpmoe.eval.questions import Question, read_questions
from vpmoe.eval.suites.likelihood import score_texts
from vpmoe.eval.suites.text import read_texts
from vpmoe.upcycle.ladder_file import Evaluation

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel

_SHOWN = 3
Progress = Callable[[str], None]


@dataclass(frozen=True)
class HeldOut:
    """What is asked, read once for all rungs.

    Attributes:
        texts: cut to the settings' length.
        questions: in the order of the file.
        decides: hashes of the two and whatever else in the settings decides the numbers, for a step's key.
    """

    texts: list[str]
    questions: list[Question]
    decides: dict[str, Any]

    @classmethod
    def read(cls, settings: Evaluation) -> HeldOut:
        """Read the files that the settings name.

        Raises:
            DataError: a file is missing, is of another form, or holds nothing.
        """
        texts = read_texts(settings.texts, settings.text_field, settings.documents)
        texts = [text[: settings.characters] for text in texts]
        questions = read_questions(settings.questions, per_family=settings.per_family)
        decides = {
            "texts": sha256_of_json(texts),
            "questions": sha256_of_file(settings.questions),
            "per_family": settings.per_family,
            "max_new_tokens": settings.max_new_tokens,
            "precision": settings.precision,
        }
        if settings.conversation_tokens is not None:
            decides["conversation_tokens"] = settings.conversation_tokens
        return cls(texts, questions, decides)


def evaluate(folder: Path, held_out: HeldOut, settings: Evaluation, *, progress: Progress) -> dict[str, Any]:
    """Ask one object everything.

    Args:
        folder: the object's; the weights of its checkpoint are loaded whole.
        held_out: what is asked.
        settings: how.
        progress: takes a line about what is going on.

    Returns:
        ``texts`` (see ``score_texts``), ``questions`` (see ``ask``), and ``conversations``: the same of the questions
        as conversations, where the settings ask for that and the weights come with system or developer messages; else
        None.

    Raises:
        CheckpointError, TokenizerError: no weights or vocabulary there.
    """
    with open_model(folder, bf16=settings.precision == "bfloat16") as opened, torch.no_grad():
        texts = score_texts(opened.model, opened.tokenizer, held_out.texts, settings.batch_size)
        progress(f"{texts['bits_per_byte']:.4f} bits per byte of {texts['bytes']:,} in {texts['documents']} texts")
        questions = ask(opened.model, AsText(opened.tokenizer), settings.max_new_tokens, held_out.questions, settings)
        progress(f"{questions['exact']} of {questions['n']} questions answered exactly")
        conversations = None
        if settings.conversation_tokens is not None and opened.prompts is not None:
            form = AsConversation(opened.tokenizer, opened.prompts)
            conversations = ask(opened.model, form, settings.conversation_tokens, held_out.questions, settings)
            progress(f"{conversations['exact']} as conversations, {conversations['valid']} in valid Harmony")
    return {"texts": texts, "questions": questions, "conversations": conversations}


def ask(
    model: VPModel, form: Form, max_new_tokens: int, questions: Sequence[Question], settings: Evaluation
) -> dict[str, Any]:
    """Answer questions greedily, in one form.

    Returns:
        ``n``, ``exact``, ``accuracy``, ``valid`` (answers that end as the form has it) over all and by family, and the
        first answers as ``samples``.
    """
    from megatron_vpmoe.generation.sampling import SamplingOptions

    options = SamplingOptions(max_new_tokens, form.stop_ids)
    prompts = [form.prompt(question.query) for question in questions]
    generated = decode_in_batches(model, prompts, options, settings.batch_size, label=None)
    judged = map(form.judge, generated)
    answered = [
        {
            "family": question.family,
            "query": question.query,
            "expected": question.row["synthetic_answer"].strip(),
            "answer": None if one.final is None else one.final.strip(),
            "valid": one.valid,
        }
        for question, one in zip(questions, judged, strict=True)
    ]
    by_family = {name: [a for a in answered if a["family"] == name] for name in sorted({a["family"] for a in answered})}
    return {
        **_share(answered),
        "families": {name: _share(group) for name, group in by_family.items()},
        "samples": answered[:_SHOWN],
    }


def _share(answered: Sequence[dict[str, Any]]) -> dict[str, Any]:
    exact = sum(one["answer"] == one["expected"] for one in answered)
    valid = sum(one["valid"] for one in answered)
    return {"n": len(answered), "exact": exact, "accuracy": exact / len(answered), "valid": valid}
