"""What every rung is asked: how likely it finds held-out texts, and whether it answers held-out questions.

The same texts and questions at every rung, whatever the vocabulary. Losses of different vocabularies compare per byte
of text, not per token. A text's first token is not scored, as nothing stands before it; its bytes are not counted
either. A question is asked as the texts ask it (``data_curation.tasks.question_texts``) and answered greedily with a
key-value cache; the answer is the first line, and has to be the expected one, blanks around it apart.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from megatron_vpmoe.files import sha256_of_file, sha256_of_json
from vpmoe.data_curation.rows.source import resolve
from vpmoe.data_curation.tasks import question_texts
from vpmoe.errors import DataError
from vpmoe.eval.nano import decode_in_batches
from vpmoe.eval.questions import Question, read_questions
from vpmoe.hf.tokenizer_files import open_tokenizer
from vpmoe.upcycle.ladder_file import Evaluation
from vpmoe.weights import megatron_checkpoint
from vpmoe.weights.geometry import load_model, process_groups

if TYPE_CHECKING:
    from megatron_vpmoe.model.gpt import VPModel

END_OF_DOCUMENT = "<|endoftext|>"
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
        rows = resolve(str(settings.texts)).rows((settings.text_field,))
        texts = []
        for place, row in islice(rows, settings.documents):
            if not isinstance(row.get(settings.text_field), str):
                raise DataError(f"the row has no text in {settings.text_field!r}", source=place, remedy="text_field")
            texts.append(row[settings.text_field][: settings.characters])
        if not texts:
            raise DataError("no text to evaluate on", source=str(settings.texts), remedy="name texts")
        questions = read_questions(settings.questions, per_family=settings.per_family)
        decides = {
            "texts": sha256_of_json(texts),
            "questions": sha256_of_file(settings.questions),
            "per_family": settings.per_family,
            "max_new_tokens": settings.max_new_tokens,
            "precision": settings.precision,
        }
        return cls(texts, questions, decides)


def evaluate(folder: Path, held_out: HeldOut, settings: Evaluation, *, progress: Progress) -> dict[str, Any]:
    """Ask one object everything.

    Args:
        folder: the object's; the weights of its checkpoint are loaded whole, its ``hf/`` gives the tokenizer.
        held_out: what is asked.
        settings: how.
        progress: takes a line about what is going on.

    Returns:
        ``texts`` (see ``score_texts``), ``questions`` (see ``ask``).

    Raises:
        WeightsError: no weights or tokenizer there.
    """
    tokenizer = open_tokenizer(folder / "hf")
    checkpoint = megatron_checkpoint.checkpoint_in(folder / "megatron")
    cfg = megatron_checkpoint.read_config(checkpoint, bf16=settings.precision == "bfloat16")
    with process_groups(), torch.no_grad():
        model = load_model(cfg, megatron_checkpoint.read_weights(checkpoint), source=str(checkpoint))
        texts = score_texts(model, tokenizer, held_out.texts, settings.batch_size)
        progress(f"{texts['bits_per_byte']:.4f} bits per byte of {texts['bytes']:,} in {texts['documents']} texts")
        questions = ask(model, tokenizer, held_out.questions, settings)
        progress(f"{questions['exact']} of {questions['n']} questions answered exactly")
    return {"texts": texts, "questions": questions}


def score_texts(model: VPModel, tokenizer: Any, texts: Sequence[str], batch_size: int) -> dict[str, Any]:
    """How likely the model finds texts.

    Returns:
        ``documents``, ``bytes`` and ``tokens`` that were scored, ``nats_per_token``, ``bits_per_byte``.
    """
    from megatron_vpmoe.generation.sampler import left_padded
    from megatron_vpmoe.runtime.device import current_device

    device = current_device()
    tokenized = [ids_of(tokenizer, text) for text in texts]
    scored_bytes = sum(
        len(text.encode()) - bytes_of_token(tokenizer, ids[0])
        for text, ids in zip(texts, tokenized, strict=True)
        if len(ids) > 1
    )
    order = sorted((ids for ids in tokenized if len(ids) > 1), key=len)
    if not order or scored_bytes <= 0:
        raise DataError("no text of two tokens", source="the texts to score", remedy="name longer texts")
    nats, tokens = 0.0, 0
    for begin in range(0, len(order), batch_size):
        ids, layout = left_padded(order[begin : begin + batch_size], device)
        scored = layout.document_id >= 0
        scored[:, -1] = False
        labels = ids.roll(-1, dims=1)
        total, terms = model(ids, layout).cross_entropy(labels, scored, torch.ones(labels.shape, device=device))
        nats, tokens = nats + float(total), tokens + len(terms)
    return {
        "documents": len(order),
        "bytes": scored_bytes,
        "tokens": tokens,
        "nats_per_token": nats / tokens,
        "bits_per_byte": nats / math.log(2) / scored_bytes,
    }


def ask(model: VPModel, tokenizer: Any, questions: Sequence[Question], settings: Evaluation) -> dict[str, Any]:
    """Answer questions greedily.

    Returns:
        ``n``, ``exact``, ``accuracy`` over all and by family, and the first answers as ``samples``.
    """
    from megatron_vpmoe.generation.sampler import SamplingOptions

    prompts = [ids_of(tokenizer, question_texts.prompt(question.query)) for question in questions]
    options = SamplingOptions(settings.max_new_tokens, stop_ids(tokenizer))
    generated = decode_in_batches(model, prompts, options, settings.batch_size, progress=lambda line: None)
    # Rows of the embedding beyond the vocabulary are padding; one that is chosen is no text.
    answers = [
        question_texts.answer_in(
            tokenizer.decode(
                [row for row in ids if row < len(tokenizer)],
                skip_special_tokens=True,
                clean_up_tokenization_spaces=False,
            )
        )
        for ids in generated
    ]
    exact: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for question, answer in zip(questions, answers, strict=True):
        asked[question.family] += 1
        exact[question.family] += answer == expected(question)
    families = {name: _share(exact[name], asked[name]) for name in sorted(asked)}
    samples = [
        {"query": question.query, "expected": expected(question), "answer": answer}
        for question, answer in list(zip(questions, answers, strict=True))[:_SHOWN]
    ]
    return {**_share(exact.total(), asked.total()), "families": families, "samples": samples}


def expected(question: Question) -> str:
    """The answer that counts."""
    return question.row["synthetic_answer"].strip()


def ids_of(tokenizer: Any, text: str) -> list[int]:
    """Ids of ``text`` as ordinary text."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def bytes_of_token(tokenizer: Any, token_id: int) -> int:
    """Bytes of a token of a byte-level vocabulary, which spells each byte as one character."""
    return len(tokenizer.convert_ids_to_tokens(token_id))


def stop_ids(tokenizer: Any) -> tuple[int, ...]:
    """What ends an answer: the end of a document, of a generation, or any token with a line break in it."""
    ends = {tokenizer.convert_tokens_to_ids(END_OF_DOCUMENT), tokenizer.eos_token_id}
    newline = tokenizer.convert_ids_to_tokens(ids_of(tokenizer, "\n"))[0]
    ends |= {row for token, row in tokenizer.get_vocab().items() if newline in token}
    return tuple(sorted(row for row in ends if row is not None))


def _share(exact: int, count: int) -> dict[str, Any]:
    return {"n": count, "exact": exact, "accuracy": exact / count}
