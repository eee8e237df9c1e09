"""Rung 2: another vocabulary. Rows by tokensurgeon, special tokens set explicitly, padding by us, tying kept.

Everything but the embedding (and the output layer where it is untied) is the input's, bit for bit.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from megatron_vpmoe.data.vocabulary_files import VOCABULARY, vocabulary_files
from megatron_vpmoe.files import json_bytes, read_json, write_atomically
from megatron_vpmoe.manifest import VocabularyEntry, read_manifest
from vpmoe.errors import UpcycleError
from vpmoe.hf.convert import Carried, read_config, run_state
from vpmoe.hf.tokenizer_files import GENERATION, assets_of, open_tokenizer
from vpmoe.tokenizer import load_tokenizer
from vpmoe.tokenizer.o200k_harmony import NAME as O200K_HARMONY
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony
from vpmoe.upcycle.inputs import Input, checkpoint_of
from vpmoe.upcycle.job import Job, JobSettings, Product, Task
from vpmoe.upcycle.rung_below import refuse_changed
from vpmoe.upcycle.token_surgery import Assignment, Surgery, new_rows
from vpmoe.upcycle.vocabulary_report import measure
from vpmoe.weights import LazyTensor, megatron_checkpoint, safetensors_folder
from vpmoe.weights.tensors import padded_with_mean

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
NUMBERS = ("1 2 3 4 5", "1234567890", "1.2345e-10", "2025-08-05", "1/3 = 0.333...")
_ROUND_TRIPS = (*NUMBERS, "Dear reader,\n\n  naïve — 東京 🙂\t<|end|> is text here.")


class VocabularySettings(JobSettings):
    """Settings of ``vocabulary``."""

    k: int = Field(default=64, ge=1)
    """Shared tokens that one row is made of."""
    batch_size: int = Field(default=512, ge=1)
    """Rows approximated together; finished batches survive an interruption."""
    special_rows: dict[str, list[str]]
    """Special token of the donor -> texts or special tokens of the source, the mean of whose rows it gets."""
    reference: str | None = None
    """Vocabulary of ours that the donor's tokenizer has to be, the same ids for every text and special token:
    "o200k_harmony", or the folder of a dataset whose (compact) vocabulary it is."""
    eos_tokens: list[str] = Field(min_length=1)
    """Tokens of the donor that end a generation."""
    texts: list[str] = Field(default_factory=list)
    """Further texts whose length and loss are compared, besides the numbers that always are."""
    largest_norm_ratio: float = Field(default=4.0, gt=1)
    """Largest norm of a new row, in units of the largest norm of an old one."""


class Vocabulary(Job[VocabularySettings]):
    """``model`` (a rung with an HF form) and ``donor`` (an HF directory: tokenizer and embedding) -> the next rung."""

    name: ClassVar[str] = "vocabulary"
    roles: ClassVar[tuple[str, ...]] = ("model", "donor")
    packages = (*Job.packages, "mergekit", "tokenizers")
    settings_type = VocabularySettings

    def convert(self, task: Task[VocabularySettings]) -> Product:
        model, donor = task.inputs["model"], task.inputs["donor"]
        source_tokenizer, donor_tokenizer = open_tokenizer(model.hf), open_tokenizer(donor.hf)
        weights = megatron_checkpoint.read_weights(model.checkpoint)
        assert model.cfg is not None
        carried = Carried.of(model.checkpoint, model.cfg)
        padded = task.cfg.model.padded_vocab_size
        specials = _special_ids(donor_tokenizer, task.settings)
        if task.settings.reference is not None:
            texts = [*_ROUND_TRIPS, *task.settings.texts]
            _check_reference(task.settings.reference, donor_tokenizer, specials, texts)

        for name in [EMBEDDING, OUTPUT] if OUTPUT in weights else [EMBEDDING]:
            source = weights[name].read()[: carried.vocab_size]
            surgery = Surgery(
                source=source,
                donor=donor_rows(donor, output=name == OUTPUT),
                source_tokenizer=source_tokenizer,
                donor_tokenizer=donor_tokenizer,
                k=task.settings.k,
                batch_size=task.settings.batch_size,
            )
            rows, assignment = new_rows(surgery, task.scratch / name, task.progress)
            if rows.shape[0] > padded:
                raise UpcycleError(
                    f"the donor's vocabulary has {rows.shape[0]} ids, the declared geometry {padded} rows",
                    source=f"{task.spec.id}: padded_vocab_size",
                    remedy="declare a larger padded_vocab_size",
                )
            whole = padded_with_mean(rows, source, padded)
            for token, row in specials.items():
                whole[row] = special_row(source, source_tokenizer, task.settings.special_rows[token])
            _check_norms(whole, source, task)
            weights[name] = LazyTensor.of(whole)
            task.report[name] = _figures(assignment, rows.shape[0], padded, len(specials), whole, source)
        assets = _assets(task, donor_tokenizer)
        eos = [donor_tokenizer.convert_tokens_to_ids(token) for token in task.settings.eos_tokens]
        kept = {**carried.hf_config, "eos_token_id": eos, "bos_token_id": None, "pad_token_id": None}
        carried = replace(carried, vocab_size=padded, hf_config=kept)
        return Product(weights, run_state(task.cfg, carried), assets)

    def verify(self, task: Task[VocabularySettings], folder: Path) -> dict[str, Any]:
        model = task.inputs["model"]
        new = checkpoint_of(folder)
        before, after = (megatron_checkpoint.read_weights(path) for path in (model.checkpoint, new))
        others = {name: name for name in before if name not in (EMBEDDING, OUTPUT)}
        refuse_changed(task, before, after, others, what="it is not of the vocabulary")
        tied = read_config(folder / "hf")["tie_word_embeddings"]
        if tied == task.cfg.model.untie_embeddings_and_output_weights:
            raise UpcycleError("the tying of the embeddings was not kept", source=task.spec.id)
        tokenizers = open_tokenizer(model.hf), open_tokenizer(folder / "hf")
        for text in _ROUND_TRIPS:
            ids = tokenizers[1](text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
            if tokenizers[1].decode(ids, clean_up_tokenization_spaces=False) != text:
                raise UpcycleError(f"the new tokenizer does not give {text!r} back", source=str(folder / "hf"))
        texts = [*NUMBERS, *task.settings.texts]
        specials = _special_ids(tokenizers[1], task.settings)
        return {
            "other_tensors_bit_identical": True,
            "tied": tied,
            "special_ids": specials,
            "texts": measure((model.checkpoint, new), tokenizers, texts),
        }


def tokens_of(folder: Path, texts: list[str], longest: int) -> list[list[int]]:
    """Texts under the tokenizer of an HF directory, without special tokens, cut to ``longest``.

    Raises:
        UpcycleError: a text of fewer than two tokens.
        WeightsError: no tokenizer.
    """
    tokenizer = open_tokenizer(folder)
    found = [tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"] for text in texts]
    short = [text for text, ids in zip(texts, found, strict=True) if len(ids) < 2]
    if short:
        raise UpcycleError(f"{short[0]!r} has no two tokens", source="texts", remedy="name longer texts")
    return [ids[:longest] for ids in found]


def _check_reference(reference: str, tokenizer: Any, specials: dict[str, int], texts: list[str]) -> None:
    ours = load_o200k_harmony() if reference == O200K_HARMONY else load_tokenizer(Path(reference))
    differing = [token for token, row in specials.items() if ours.special_tokens.get(token) != row]
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        if ids != ours.encode_ordinary(text).tolist():
            differing.append(text)
    if differing:
        raise UpcycleError(
            f"the donor's tokenizer is not {ours.name}: it differs on {differing[0]!r}",
            source=f"reference: {reference}",
            remedy="name the donor whose tokenizer is the reference's, or set no reference",
        )


def donor_rows(donor: Input, *, output: bool) -> Tensor:
    """The donor's embedding, or its output layer (a tied donor's embedding), [rows, d]; nothing else is read."""
    weights = safetensors_folder.read_weights(donor.hf, partial=donor.spec.partial)
    wanted = ["lm_head.weight"] if output else []
    names = [*wanted, "model.embed_tokens.weight", "model.language_model.embed_tokens.weight"]
    found = next((name for name in names if name in weights), None)
    if found is None or len(weights[found].shape) != 2 or not weights[found].dtype.is_floating_point:
        fault = f"is {weights[found].dtype} {list(weights[found].shape)}" if found else "is missing"
        raise UpcycleError(
            f"the donor's {found or names[-2]} {fault}",
            source=str(donor.hf),
            remedy="put the shard there that holds it, as rows of bfloat16 or float32",
        )
    return weights[found].read()


def _special_ids(tokenizer: Any, settings: VocabularySettings) -> dict[str, int]:
    """Ids of the donor's special tokens that get explicit rows; every one that ends a generation must be among them."""
    vocabulary = tokenizer.get_vocab()
    missing = [token for token in [*settings.special_rows, *settings.eos_tokens] if token not in vocabulary]
    unset = [token for token in settings.eos_tokens if token not in settings.special_rows]
    if missing or unset:
        raise UpcycleError(
            f"not in the donor's vocabulary: {missing or 'none'}; without a row of their own: {unset or 'none'}",
            source="special_rows, eos_tokens",
            remedy="name special tokens of the donor, and give every eos token a row",
        )
    return {token: vocabulary[token] for token in settings.special_rows}


def special_row(source: Tensor, tokenizer: Any, texts: list[str]) -> Tensor:
    """The mean row [h] of all tokens of all texts in the source's vocabulary, specials among them by their spelling."""
    ids = [token for text in texts for token in tokenizer(text, add_special_tokens=False)["input_ids"]]
    if not ids:
        raise UpcycleError(f"{texts} has no token", source="special_rows", remedy="give it a text")
    return source[ids].double().mean(dim=0).to(source.dtype)


def _check_norms(rows: Tensor, source: Tensor, task: Task[VocabularySettings]) -> None:
    limit = task.settings.largest_norm_ratio * float(source.float().norm(dim=1).max())
    norms = rows.float().norm(dim=1)
    worst = int(norms.argmax())
    if not float(norms[worst]) <= limit:
        raise UpcycleError(
            f"row {worst} has norm {float(norms[worst]):.3g}, above {limit:.3g}",
            source=f"{task.spec.id}: k {task.settings.k}",
            remedy="a smaller k, or a larger largest_norm_ratio if this is meant",
        )


def _figures(
    assignment: Assignment, tokens: int, padded: int, specials: int, rows: Tensor, source: Tensor
) -> dict[str, Any]:
    quantiles = torch.tensor([0.0, 0.5, 0.99, 1.0], dtype=torch.float64)

    def norms(matrix: Tensor) -> list[float]:
        return [round(float(q), 5) for q in torch.quantile(matrix.double().norm(dim=1), quantiles)]

    return {
        "rows_copied": len(assignment.copied),
        "rows_approximated": len(assignment.approximated),
        "rows_set_explicitly": specials,
        "rows_padding": padded - tokens,
        "norms_min_median_p99_max": {"source": norms(source), "result": norms(rows)},
    }


def _assets(task: Task[VocabularySettings], tokenizer: Any) -> list[Path]:
    """The donor's tokenizer files, or the reference's that it is, and generation settings that end at its tokens."""
    donor = task.inputs["donor"].hf
    own = task.inputs["model"].hf / GENERATION
    settings = read_json(own, error=UpcycleError) if own.is_file() else {}
    settings |= {"eos_token_id": [tokenizer.convert_tokens_to_ids(token) for token in task.settings.eos_tokens]}
    for name in ("bos_token_id", "pad_token_id"):
        settings.pop(name, None)
    written = task.scratch / GENERATION
    write_atomically(written, json_bytes(settings))
    if task.settings.reference is None:
        return [*assets_of(donor), written]
    # What the donor's tokenizer is known to be: an own vocabulary of ours, as datasets name it.
    if task.settings.reference == O200K_HARMONY:
        entry = VocabularyEntry.model_validate(load_o200k_harmony().entry)
        files = {VOCABULARY: json_bytes(entry.model_dump())}
    else:
        files = vocabulary_files(read_manifest(task.settings.reference))
    for name, content in files.items():
        write_atomically(task.scratch / name, content)
    return [*(task.scratch / name for name in files), written]
