"""The suite of likelihoods: any texts, or the conversations of a dataset's split, as a report."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from megatron_vpmoe.data.batch import Span
from megatron_vpmoe.errors import ConfigError
from megatron_vpmoe.files import sha256_of_json
from megatron_vpmoe.manifest import Manifest, read_manifest
from megatron_vpmoe.runtime import distributed
from vpmoe.data_curation.rows.source import resolve
from vpmoe.errors import DataError
from vpmoe.eval.open_model import open_model, require_folder
from vpmoe.eval.suites import suite_report
from vpmoe.eval.suites.likelihood import Passage, Sums, dataset_passages, measure, text_passages
from vpmoe.progress import Progress
from vpmoe.tokenizer import Tokenizer

SUITE, WINDOW = "text", 2048
VERSION = 1
"""Of what is reported; decides whether a keyed step's evaluation is done."""
Say = Callable[[str], None]


@dataclass(frozen=True)
class Asked:
    """What to measure, and how.

    Attributes:
        texts: a file or folder of texts; None: ``data_path`` is given instead.
        data_path: a dataset of conversations.
        split: of it.
        text_field: column of the text.
        documents: so many of the first; None: all.
        window: tokens that the model reads at once; None: as it was trained, else 2048. Conversations are not cut.
        stride: tokens from one window to the next; None: half a window.
        batch_size: passages that a process reads at once.
        bf16: compute in bfloat16 or not; None: as the run did.
        output: the report; None: ``reports/eval/text/<checkpoint>[_int8].json``.
        overwrite: replace a finished report.
        quiet: no progress bar.
    """

    texts: Path | None = None
    data_path: Path | None = None
    split: str = "valid"
    text_field: str = "text"
    documents: int | None = None
    window: int | None = None
    stride: int | None = None
    batch_size: int = 8
    bf16: bool | None = None
    output: Path | None = None
    overwrite: bool = False
    quiet: bool = False


def evaluate(path: Path, asked: Asked, *, say: Say, int8: bool = False, store: Path | None = None) -> dict[str, Any]:
    """Measure the model at ``path``, write report and documents, return the report; a collective of all ranks.

    ``int8`` and ``store`` as :func:`vpmoe.eval.open_model.open_model` takes them; the report says so.

    Raises:
        CheckpointError, DataError, TokenizerError, ConfigError: something named does not exist or does not fit.
        NotOursError: something else lies where the report belongs.
    """
    started = time.perf_counter()
    require_folder(path)
    measured = read(asked)
    with open_model(path, bf16=asked.bf16, int8=int8, store=store) as opened:
        output = suite_report.output_for(SUITE, opened, asked.output, overwrite=asked.overwrite)
        if isinstance(measured, Manifest):
            opened.require_vocabulary(measured)
        passages, source = passages_of(opened.tokenizer, measured, asked, opened.context)
        with Progress(SUITE, len(passages), unit="passages", quiet=asked.quiet or distributed.rank() != 0) as progress:
            ranks = distributed.world_size()
            sums = measure(
                opened.model,
                passages,
                batch_size=asked.batch_size,
                spans=len(Span),
                watch=lambda count: progress.add(count * ranks),
            )
        items = _items(sums, spans_of(asked))
        report = {
            **suite_report.head(SUITE, opened, {**source, "bf16": opened.cfg.training.bf16}),
            "tasks": _entries(sums, asked, items),
            "wall_seconds": round(time.perf_counter() - started, 2),
        }
        suite_report.write(output, report, items)
    say(f"{output} written")
    return report


def read(asked: Asked) -> list[str] | Manifest:
    """The texts to measure, or the dataset.

    Raises:
        ConfigError: both are asked for, or neither.
        DataError: there are none.
    """
    if asked.texts is not None and asked.data_path is None:
        return read_texts(asked.texts, asked.text_field, asked.documents)
    if asked.data_path is not None and asked.texts is None:
        return read_manifest(asked.data_path)
    raise ConfigError("what to measure is not one thing", source="--texts, --data-path", remedy="give one of them")


def read_texts(path: Path, field: str, limit: int | None) -> list[str]:
    """The texts of a file or folder, or the first of them.

    Raises:
        DataError: nothing to read there, or a row without text.
    """
    texts = []
    for place, row in islice(resolve(str(path)).rows((field,)), limit):
        if not isinstance(row.get(field), str):
            raise DataError(f"the row has no text in {field!r}", source=place, remedy="name its column")
        texts.append(row[field])
    if not texts:
        raise DataError("no text to evaluate on", source=str(path), remedy="name texts")
    return texts


def passages_of(
    tokenizer: Tokenizer, measured: Sequence[str] | Manifest, asked: Asked, context: int | None
) -> tuple[list[Passage], dict[str, Any]]:
    """What the model reads, and where it comes from, for the report.

    Args:
        tokenizer: its vocabulary, which is the dataset's.
        measured: as ``read`` gives it.
        asked: how to measure it.
        context: tokens that the model was trained with; None: nobody says.

    Raises:
        DataError: there is nothing to score.
    """
    if isinstance(measured, Manifest):
        return _of_dataset(tokenizer, measured, asked)
    window = asked.window or context or WINDOW
    source = {"texts": str(asked.texts), "sha256": sha256_of_json(measured)}
    source |= {"window": window, "stride": asked.stride or max(1, window // 2)}
    return text_passages(tokenizer, measured, window, asked.stride), source


def spans_of(asked: Asked) -> dict[str, int]:
    """What the numbers are of: the texts, or each span of a dataset."""
    return {SUITE: 0} if asked.data_path is None else {span.name.lower(): int(span) for span in Span}


def tasks_of(sums: Sums, asked: Asked) -> dict[str, dict[str, Any]]:
    """The numbers of each span that is there, and of several those of all."""
    spans: dict[str, int | slice] = {**spans_of(asked)}
    if len(spans) > 1:
        spans[suite_report.ALL] = slice(None)
    return {name: sums.entry(span) for name, span in spans.items() if sums.cells[1, span].any()}


def _of_dataset(tokenizer: Tokenizer, manifest: Manifest, asked: Asked) -> tuple[list[Passage], dict[str, Any]]:
    from megatron_vpmoe.data.kd_dataset import KDDataset

    dataset = KDDataset(manifest, asked.split, seq_length=manifest.seq_length)
    passages = list(islice(dataset_passages(dataset, tokenizer), asked.documents))
    if not passages:
        raise DataError("nothing is supervised in it", source=f"{manifest.root / asked.split}", remedy="name another")
    return passages, {"dataset": str(manifest.root), "manifest_sha256": manifest.sha256, "split": asked.split}


def _items(sums: Sums, spans: Mapping[str, int]) -> list[dict[str, Any]]:
    """A line for each span of each document, to compare models document by document."""
    return [
        {"task": name, "item": number, "nats": float(nats), "tokens": int(tokens), "bytes": int(size)}
        for name, span in spans.items()
        for number, (nats, tokens, size) in enumerate(sums.documents[:, :, span].T)
        if tokens
    ]


def _entries(sums: Sums, asked: Asked, items: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The tasks of the report."""
    entries = {}
    for name, entry in tasks_of(sums, asked).items():
        bits = entry["bits_per_byte"]
        spread = None if bits is None else suite_report.bootstrapped("bits_per_byte", name, items)
        entries[name] = {"n": len(suite_report.of_task(name, items)), **entry, "interval": spread}
    return entries


def summary_lines(report: dict[str, Any]) -> str:
    """The report as a few lines."""
    lines = []
    for name, entry in report["tasks"].items():
        bits = "" if entry["bits_per_byte"] is None else f"{entry['bits_per_byte']:.4f} bits per byte, "
        numbers = f"{entry['nats_per_token']:.4f} nats per token, perplexity {entry['perplexity']:.2f}"
        lines.append(f"{name:<10}{bits}{numbers}; {entry['tokens']:,} tokens of {entry['n']:,} documents")
    return "\n".join(lines)
