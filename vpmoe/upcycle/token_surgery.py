"""The rows of an embedding for another vocabulary, by mergekit's tokensurgeon, in batches that survive an interruption.

What mergekit-tokensurgeon's command line does for one matrix, through its own functions: a token that both vocabularies
have keeps its row, bit for bit; every other row is approximated from the rows of shared tokens, by the combination that
gives the token's row in the donor's embedding (OMP: at most k of them). The command line itself is not used because it
keeps nothing until its end, which is hours away at full size, refuses GPT-OSS's architecture, and wants all weights of
both models; a test holds the rows to its output, bit for bit.

Shapes: V target tokens, N shared tokens, h the model's hidden size, d the donor's.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from megatron_vpmoe.files import move_into_place
from vpmoe.errors import UpcycleError


@dataclass(frozen=True)
class Surgery:
    """One matrix's surgery.

    Attributes:
        source: the model's rows, [>= its tokens, h].
        donor: the donor's rows, [>= V, d].
        source_tokenizer, donor_tokenizer: HF tokenizers of the two.
        k: shared tokens that one row is made of, below both hidden sizes.
        batch_size: rows approximated together; memory of OMP is about ``batch_size`` x (d x k + N) floats.
    """

    source: Tensor
    donor: Tensor
    source_tokenizer: Any
    donor_tokenizer: Any
    k: int
    batch_size: int


@dataclass(frozen=True)
class Assignment:
    """Where each target row comes from.

    Attributes:
        copied: target id -> source id, of tokens that both have.
        approximated: tokens without one, in mergekit's normal form, in the donor's order.
        shared: number of tokens in both vocabularies.
    """

    copied: dict[int, int]
    approximated: list[Any]
    target_ids: list[int]
    shared: int


def assign(surgery: Surgery) -> tuple[Assignment, dict[Any, int], dict[Any, int]]:
    """Match the two vocabularies; also returns both in mergekit's normal form (token -> id within the rows)."""
    from mergekit.tokenizer.normalization import normalized_vocabulary

    known = _within(normalized_vocabulary(surgery.source_tokenizer), surgery.source.shape[0], "the model")
    target = _within(normalized_vocabulary(surgery.donor_tokenizer), surgery.donor.shape[0], "the donor")
    copied: dict[int, int] = {}
    approximated: list[Any] = []
    # By id: a tokenizer gives its vocabulary in another order each time, and batches have to be the same ones again.
    for token, row in sorted(target.items(), key=lambda item: item[1]):
        if token in known:
            copied[row] = known[token]
        else:
            approximated.append(token)
    shared = len(known.keys() & target.keys())
    return Assignment(copied, approximated, [target[token] for token in approximated], shared), known, target


def _within(vocabulary: dict[Any, int], rows: int, whose: str) -> dict[Any, int]:
    for token, row in vocabulary.items():
        if row >= rows:
            raise UpcycleError(
                f"{whose}'s tokenizer gives {token!r} the id {row}, and its embedding has {rows} rows",
                source=whose,
                remedy="put the tokenizer there that belongs to these weights",
            )
    return vocabulary


def check(surgery: Surgery, assignment: Assignment) -> None:
    """Refuse what would run for hours and then be worthless.

    Raises:
        UpcycleError: no shared tokens, or a k that determines the combination no more.
    """
    if assignment.shared == 0:
        raise UpcycleError(
            "the two vocabularies share no token", source="donor", remedy="name a donor with a byte-level vocabulary"
        )
    limits = {
        "the model's hidden size": surgery.source.shape[1],
        "the donor's hidden size": surgery.donor.shape[1],
        "the number of shared tokens + 1": assignment.shared + 1,
    }
    for what, limit in limits.items():
        if surgery.k >= limit:
            raise UpcycleError(
                f"k = {surgery.k} has to be below {what}, {limit}: otherwise the rows' norms explode",
                source="k",
                remedy=f"k = {max(1, limit // 16)} or so",
            )


def new_rows(surgery: Surgery, scratch: Path, progress: Callable[[str, int], None]) -> tuple[Tensor, Assignment]:
    """The matrix for the donor's vocabulary, [donor's highest id + 1, h] in the dtype of ``source``.

    Args:
        scratch: finished batches are kept here; a second call with the same surgery goes on after them.
        progress: told ("... of ... rows", bytes) after each batch.

    Raises:
        UpcycleError: see ``check``; or a row that is not finite.
    """
    import transformers
    from mergekit.common import ModelReference
    from mergekit.scripts import tokensurgeon

    logging.getLogger("mergekit").setLevel(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    assignment, known, target = assign(surgery)
    check(surgery, assignment)
    nowhere = ModelReference.model_validate("unused")
    options = tokensurgeon.TokenSurgeonOptions(
        model=nowhere,
        donor=nowhere,
        out_path="unused",
        method=tokensurgeon.ApproximationMethod("omp"),
        k=surgery.k,
    )

    rows = torch.zeros(max(target.values()) + 1, surgery.source.shape[1], dtype=surgery.source.dtype)
    rows[list(assignment.copied)] = surgery.source[list(assignment.copied.values())]
    tokens, count = assignment.approximated, len(assignment.approximated)
    scratch.mkdir(parents=True, exist_ok=True)
    for begin in range(0, count, surgery.batch_size):
        end = min(begin + surgery.batch_size, count)
        kept = scratch / f"rows_{begin:07d}.safetensors"
        if kept.is_file():
            batch = load_file(kept)["rows"]
        else:
            batch = tokensurgeon.compute_new_embeddings(
                surgery.source,
                surgery.donor,
                known,
                target,
                target_tokens=tokens[begin:end],
                is_lm_head=False,
                token_basis=None,
                orig_tokenizer=surgery.source_tokenizer,
                options=options,
            )
            partial = kept.with_suffix(".partial")
            save_file({"rows": batch.contiguous()}, partial)
            move_into_place(partial, kept)
        rows[assignment.target_ids[begin:end]] = batch.to(rows.dtype)
        progress(f"{end} of {count} rows", batch.nbytes)
    if not bool(torch.isfinite(rows).all()):
        raise UpcycleError("an approximated row is not finite", source=f"k = {surgery.k}", remedy="a smaller k")
    return rows, assignment
