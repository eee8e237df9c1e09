"""What has to hold of token files beyond their hashes and sums, by the kind of dataset that the manifest names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from megatron_vpmoe.manifest import PREFERENCE
from megatron_vpmoe.token_files import Triple
from vpmoe.data_curation.datasets.text import KIND as TEXT_KIND
from vpmoe.errors import DataError, HarmonyError
from vpmoe.harmony.parse import Parser, spans_of
from vpmoe.harmony.spans import ANALYSIS, SPAN_NAMES
from vpmoe.tokenizer.interface import Tokenizer

REBUILD = "build the dataset again with --overwrite"

Check = tuple[NDArray[np.bool_], str]


def signal_checks(triple: Triple, manifest: dict[str, Any]) -> Iterator[Check]:
    """``(places that are wrong, what is wrong there)`` of a part of a shard; behind what is wrong nothing is sure."""
    lengths = triple.lengths
    last = triple.starts + lengths - 1
    tokens, lossmask, span = map(np.asarray, (triple.tokens, triple.lossmask, triple.span))
    yield (
        (lengths < 1) | (lengths > manifest["seq_length"]),
        f"documents outside 1..{manifest['seq_length']} tokens",
    )
    yield (tokens < 0) | (tokens >= manifest["tokenizer"]["vocab_size"]), "ids outside the vocabulary"
    yield span >= len(SPAN_NAMES), "span ids that do not exist"
    yield span[last] != 0, "documents whose last label is supervised"
    ends_in_eod = tokens[last] == manifest["tokenizer"]["eod_id"]
    if manifest["kind"] == TEXT_KIND:
        supervised = np.ones(len(lossmask), dtype=np.bool_)
        supervised[last] = False
        yield lossmask != supervised, "places where the loss mask is not that of plain text"
        yield span != 0, "places of plain text with a span"
        shortest_piece = manifest["seq_length"] - 1
        yield (
            ~ends_in_eod & (lengths < shortest_piece),
            "documents that end neither in <|endoftext|> nor at the sequence length",
        )
        return
    yield ~ends_in_eod, "conversations that do not end in <|endoftext|>"
    yield lossmask != (span > 0), "places where loss mask and span disagree"
    opens, *closes = (manifest["tokenizer"]["special_tokens"].get(f"<|{n}|>", -1) for n in ("message", "end", "return"))
    yield (tokens[:-1] == opens) & np.isin(tokens[1:], closes), "messages without text"
    if manifest["kind"] == PREFERENCE:
        yield from _pair_checks(triple, manifest)


def check_sample(triple: Triple, tokenizer: Tokenizer, manifest: dict[str, Any], count: int, where: str) -> None:
    """Work out ``count`` documents of a shard a second time, conversations by the parser, text by the tokenizer.

    Raises:
        DataError: one is not what the tokens say.
    """
    # A vocabulary of plain text need not have what conversations are parsed by.
    parser = None if manifest["kind"] == TEXT_KIND else Parser(tokenizer)
    config = manifest["config"]
    only_last, as_read = config.get("supervise") == "last", config.get("earlier_analysis") == "dropped"
    for document in np.unique(np.linspace(0, triple.documents - 1, min(count, triple.documents), dtype=np.int64)):
        if parser is None:
            _check_text(triple, tokenizer, int(document), where)
        else:
            _check_conversation(triple, parser, int(document), where, only_last=only_last, as_read=as_read)


def _pair_checks(triple: Triple, manifest: dict[str, Any]) -> Iterator[Check]:
    lengths = triple.lengths
    yield np.array([len(lengths) % 2 == 1]), "shard with a document that has no partner"
    pairs = lengths[: len(lengths) // 2 * 2].reshape(-1, 2)
    yield pairs.sum(axis=1) > manifest["seq_length"], f"pairs longer than {manifest['seq_length']} tokens"
    yield (
        np.array([not _same_prompt(triple, 2 * pair) for pair in range(len(pairs))], dtype=np.bool_),
        "pairs whose two prompts differ",
    )


def _same_prompt(triple: Triple, document: int) -> bool:
    prompts = []
    for place in (triple.place(document), triple.place(document + 1)):
        supervised = np.flatnonzero(triple.span[place])
        prompts.append(triple.tokens[place][: supervised[0] + 1] if len(supervised) else None)
    return prompts[0] is not None and prompts[1] is not None and np.array_equal(*prompts)


def _check_conversation(
    triple: Triple, parser: Parser, document: int, where: str, *, only_last: bool, as_read: bool
) -> None:
    place = triple.place(document)
    tokens, stored = triple.tokens[place], triple.span[place]
    try:
        parsed = parser.parse(tokens[:-1])
    except HarmonyError as error:
        raise DataError(f"conversation {document}: {error.what}", source=where, remedy=REBUILD) from error
    spans = spans_of(parsed, len(tokens))
    turns = [item.stop for item in parsed if item.message.role == "user"] or [0]
    if as_read and (spans[: turns[-1]] == ANALYSIS).any():
        raise DataError(f"conversation {document}: analysis of an earlier turn", source=where, remedy=REBUILD)
    if only_last or as_read:  # of all turns, those that an earlier document has taught are read alone
        first = int(np.argmax(stored != 0)) + 1
        spans[: turns[-1] if only_last else max((turn for turn in turns if turn <= first), default=0)] = 0
    expected = np.append(spans[1:], 0)
    if not np.array_equal(expected, stored):
        at = int(np.flatnonzero(expected != stored)[0])
        raise DataError(
            f"conversation {document}: the span at {at} is {stored[at]}, its tokens say {expected[at]}",
            source=where,
            remedy=REBUILD,
        )


def _check_text(triple: Triple, tokenizer: Tokenizer, document: int, where: str) -> None:
    """Decode the whole document that a piece belongs to, and encode it again."""

    def ends(piece: int) -> bool:
        return triple.tokens[triple.place(piece).stop - 1] == tokenizer.eod_id

    first = document
    while first and not ends(first - 1):
        first -= 1
    last = document
    while last + 1 < triple.documents and not ends(last):
        last += 1
    stored = np.asarray(triple.tokens[triple.place(first).start : triple.place(last).stop])
    again = tokenizer.encode_ordinary(tokenizer.decode(stored[:-1]))
    if not ends(last) or not np.array_equal(again, stored[:-1]):
        raise DataError(f"document {document} is not what its own text encodes to", source=where, remedy=REBUILD)
