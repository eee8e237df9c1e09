"""``vpmoe data build ...``: datasets of token files from conversations, text, chat rows and pairs, and vocabularies.

A build that was killed goes on after its last finished shard when the same command is given again.
"""

from __future__ import annotations

import os
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_vpmoe.manifest import PromptsEntry, read_manifest
from vpmoe.data_curation.datasets import kd, vocabularies
from vpmoe.data_curation.datasets.chat import ChatDataset
from vpmoe.data_curation.datasets.finish import summary
from vpmoe.data_curation.datasets.flat_files import write_flat
from vpmoe.data_curation.datasets.from_flat import build_from_flat
from vpmoe.data_curation.datasets.options import (
    Chat,
    Common,
    Output,
    Overwrite,
    Rendered,
    Renderer,
    Rows,
    Source,
    TextField,
    Texts,
    flags,
    names,
)
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.rollout_prompts import write_prompts
from vpmoe.data_curation.datasets.sequential import Pass, RowKind, build_sequential
from vpmoe.data_curation.datasets.text import HealingText
from vpmoe.data_curation.rows.files import TEXT_COLUMN
from vpmoe.data_curation.rows.source import SUFFIXES, resolve
from vpmoe.errors import DataError
from vpmoe.harmony.prompts import Prompts
from vpmoe.tokenizer.app import app as tokenizer_app
from vpmoe.tokenizer.bpe import SpecialTokens
from vpmoe.tokenizer.from_dataset import load_tokenizer
from vpmoe.tokenizer.hf_directory import HFDirectory

app = typer.Typer()


@app.command()
@flags
def build(
    input_dir: Annotated[Path, typer.Option(help="conversations with their manifest")],
    output: Output,
    common: Common,
    *,
    workers: Annotated[int, typer.Option(help="processes that encode")] = os.cpu_count() or 1,
    compact_vocab_size: Annotated[
        int | None, typer.Option(help="count ids in train and keep this many, bytes included")
    ] = None,
    split_by: Annotated[
        Literal["id", "content"],
        typer.Option(help="what decides the split; by content, copies under several ids stay together"),
    ] = "id",
    renderer: Renderer = "fast",
) -> None:
    """Build distillation data: Harmony conversations -> token files (tokens, lossmask, span) and a manifest."""
    options = common.options(compact_vocab_size=compact_vocab_size, split_by=split_by, renderer=renderer)
    manifest = kd.build(
        input_dir, output.output_dir, options, workers=workers, overwrite=output.overwrite, quiet=output.quiet
    )
    typer.echo(summary(output.output_dir, manifest))


@app.command()
@flags
def build_text(
    output: Output,
    source: Source,
    common: Common,
    *,
    text_field: TextField = TEXT_COLUMN,
    id_field: Annotated[
        str | None, typer.Option(help="column of the document's id, which decides the split; default: the text")
    ] = None,
    language_field: Annotated[str | None, typer.Option(help="column of the language; needed by --language")] = None,
    language: Annotated[str, typer.Option(help="comma-separated values of that column to keep")] = "",
    drop_long: Annotated[
        bool, typer.Option("--drop-long", help="drop documents longer than --seq-len instead of cutting them")
    ] = False,
) -> None:
    """Build healing text: plain text -> token files with every token supervised, and a manifest."""
    kind = HealingText(
        common.options(split_field=source.split_field),
        text_field=text_field,
        id_field=id_field,
        language_field=language_field,
        languages=names(language),
        drop_long=drop_long,
    )
    _build_rows(output, source, kind)


@app.command()
@flags
def build_chat(
    output: Output,
    source: Source,
    common: Common,
    chat: Chat,
    *,
    supervise: Annotated[
        Literal["all", "last"], typer.Option(help="all assistant messages, or those of the last turn")
    ] = "all",
) -> None:
    """Build SFT data: chat rows (messages, or prompt and completion) -> token files and a manifest."""
    _build_rows(output, source, _chat(common, source, chat, supervise=supervise))


@app.command()
@flags
def build_pairs(output: Output, source: Source, common: Common, chat: Chat) -> None:
    """Build preference data: rows of chosen against rejected -> token files of pairs and a manifest."""
    _build_rows(output, source, _chat(common, source, chat, pairs=True, supervise="last"))


@app.command()
def to_flat(
    dataset: Annotated[Path, typer.Argument(help="a dataset of plain text (build-text)")],
    output_dir: Annotated[Path, typer.Option(help="folder to make")],
    overwrite: Overwrite = False,
) -> None:
    """Write a dataset of plain text as train.bin and val.bin, ids one after the other, and meta.json."""
    meta = write_flat(dataset, output_dir, overwrite=overwrite, say=_say)
    told = ", ".join(f"{file.name} {file.documents:,} documents, {file.tokens:,} ids" for file in meta.files.values())
    typer.echo(f"{output_dir}: {meta.dtype}; {told}")


@app.command()
@flags
def from_flat(
    flat: Annotated[Path, typer.Argument(help="a folder with meta.json and the files that it names")],
    output: Output,
    rendered: Rendered,
) -> None:
    """Build a dataset of plain text from flat token files; the vocabulary is theirs, unless --tokenizer names it."""
    base = BuildOptions(**asdict(rendered), valid_fraction=0.0)
    manifest = build_from_flat(flat, output.output_dir, base, overwrite=output.overwrite, quiet=output.quiet)
    typer.echo(summary(output.output_dir, manifest))


@app.command()
def prompts(
    questions: Annotated[str, typer.Option("--input", help=f"rows: a file or folder ({', '.join(SUFFIXES)})")],
    output: Annotated[Path, typer.Option(help="file to write; another such file is replaced")],
    dataset: Annotated[
        Path | None, typer.Option(help="whose vocabulary, system and developer messages the model was taught")
    ] = None,
    tokenizer: Annotated[
        Path | None, typer.Option(help="instead of --dataset: HF directory of the vocabulary, and no messages")
    ] = None,
    field: Annotated[str, typer.Option(help="of what the user says")] = "query",
) -> None:
    """Write prompts for rollouts (rollouts.rollout_prompts): questions rendered, each with its row for the rewards."""
    if (dataset is None) == (tokenizer is None):
        raise DataError("the vocabulary is not named once", source="--dataset, --tokenizer", remedy="give one of them")
    vocabulary = HFDirectory(tokenizer) if tokenizer is not None else load_tokenizer(dataset or "")
    given = None if dataset is None else read_manifest(dataset).prompts
    count = write_prompts(resolve(questions), field, output, tokenizer=vocabulary, given=given)
    typer.echo(f"{output}: {count:,} prompts")


@app.command()
def compact_map(
    source: Texts,
    output_dir: Annotated[Path, typer.Option(help="folder to make")],
    size: Annotated[int, typer.Option(help="ids in all, 256 bytes and 9 special tokens among them")],
    text_field: TextField = TEXT_COLUMN,
    overwrite: Overwrite = False,
) -> None:
    """Choose the o200k ids that texts use most as a compact vocabulary: --compact-map OUTPUT_DIR/compact_vocab.npy."""
    texts = vocabularies.Texts(resolve(source), text_field)
    vocabularies.write_compact_map(texts, output_dir, size=size, overwrite=overwrite, say=_say)
    typer.echo(str(output_dir / vocabularies.COMPACT_MAP_NAME))


@tokenizer_app.command("train")
@flags
def train_tokenizer(
    source: Rows,
    output_dir: Annotated[Path, typer.Option(help="HF directory to make")],
    vocab_size: Annotated[int, typer.Option(help="ids in all, 256 bytes and the special tokens among them")],
    *,
    special_tokens: Annotated[
        SpecialTokens, typer.Option(help="harmony: those that conversations are made of; qwen: for plain text")
    ] = "qwen",
    text_field: TextField = TEXT_COLUMN,
    split_field: Annotated[
        str | None, typer.Option(help="column that says the row's split: learn from those of train alone")
    ] = None,
    max_rows: Annotated[int | None, typer.Option(help="learn from so many of the first rows; default: all")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Learn a byte-level BPE in Qwen's form from texts: vpmoe data build-text --tokenizer OUTPUT_DIR."""
    texts = vocabularies.Texts(source.resolved(), text_field, split_field, max_rows)
    size = vocabularies.write_bpe(
        texts, output_dir, vocab_size=vocab_size, special_tokens=special_tokens, overwrite=overwrite, say=_say
    )
    short = f" of {vocab_size:,}: the texts have no more pairs to merge" if size < vocab_size else ""
    typer.echo(f"{output_dir}: {size:,} ids{short}")


def _chat(
    common: Common, source: Source, chat: Chat, *, supervise: Literal["all", "last"], pairs: bool = False
) -> ChatDataset:
    given = PromptsEntry(system=Prompts().system_text() if chat.add_system else None)
    if chat.prompts_of is not None:
        if chat.add_system:
            raise DataError("two system messages", source="--add-system and --prompts-of", remedy="give one of them")
        given = read_manifest(chat.prompts_of).prompts or given
    return ChatDataset(
        common.options(split_field=source.split_field, renderer=chat.renderer),
        pairs=pairs,
        supervise=supervise,
        id_field=chat.id_field,
        system_text=given.system,
        developer_text=given.developer,
        ignore_fields=names(chat.ignore_fields),
    )


def _build_rows(output: Output, source: Source, kind: RowKind) -> None:
    rows = source.resolved()
    extent = Pass(source.shard_tokens, source.token_budget)
    manifest = build_sequential(rows, output.output_dir, kind, extent, overwrite=output.overwrite, quiet=output.quiet)
    typer.echo(summary(output.output_dir, manifest))


def _say(line: str) -> None:
    typer.echo(line, err=True)
