"""``vpmoe data build ...``: datasets of token files from conversations, text, chat rows and pairs, and vocabularies.

A build that was killed goes on after its last finished shard when the same command is given again.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from megatron_vpmoe.manifest import PromptsEntry, read_manifest
from vpmoe.data_curation.datasets import kd, vocabularies
from vpmoe.data_curation.datasets.chat import ChatDataset
from vpmoe.data_curation.datasets.finish import summary
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.rollout_prompts import write_prompts
from vpmoe.data_curation.datasets.sequential import Pass, RowKind, build_sequential
from vpmoe.data_curation.datasets.text import HealingText
from vpmoe.data_curation.rows.files import TEXT_COLUMN
from vpmoe.data_curation.rows.source import SUFFIXES, resolve
from vpmoe.errors import DataError
from vpmoe.harmony.prompts import Prompts
from vpmoe.tokenizer.app import app as tokenizer_app

app = typer.Typer()
_BASE = BuildOptions()
Renderer = Annotated[Literal["fast", "official"], typer.Option(help="ours, or openai-harmony's, which writes the same")]
TextField = Annotated[str, typer.Option(help="column of the text (of text files: text)")]
Texts = Annotated[str, typer.Option("--input", help="texts: a file or folder of JSONL, parquet or .txt")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what was made of other input or options")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress")]


@dataclass(frozen=True)
class Output:
    """Where to, and how it is done."""

    output_dir: Annotated[Path, typer.Option(help="folder of the dataset")]
    overwrite: Overwrite = False
    quiet: Quiet = False


@dataclass(frozen=True)
class Common:
    """What every kind of dataset is asked; named as the fields of :class:`BuildOptions`."""

    seq_len: Annotated[int, typer.Option(help="longest document in tokens, separator counted")] = _BASE.seq_len
    valid_fraction: Annotated[float, typer.Option(help="share of the split valid")] = _BASE.valid_fraction
    tokenizer_model: Annotated[Path | None, typer.Option(help="o200k_base.tiktoken, if not in the usual places")] = None
    compact_map: Annotated[Path | None, typer.Option(help="use another dataset's compact_vocab.npy")] = None
    padded_vocab_size: Annotated[int | None, typer.Option(help="embedding rows of the vocabulary")] = None
    strict: Annotated[bool, typer.Option(help="stop where more rows are invalid than may be")] = _BASE.strict
    max_reject_fraction: Annotated[float, typer.Option(help="rows that may be invalid")] = _BASE.max_reject_fraction


@dataclass(frozen=True)
class Source:
    """Rows, and how far to read them."""

    input: Annotated[str, typer.Option(help=f"file or folder ({', '.join(SUFFIXES)}), or a hub id")]
    revision: Annotated[str | None, typer.Option(help="commit of the hub dataset; needed for a hub id")] = None
    hub_config: Annotated[str | None, typer.Option(help="configuration of the hub dataset, if it has several")] = None
    hub_split: Annotated[str, typer.Option(help="split of the hub dataset")] = "train"
    token_budget: Annotated[int | None, typer.Option(help="end before this many tokens are exceeded")] = None
    shard_tokens: Annotated[int, typer.Option(help="tokens of a shard")] = Pass().shard_tokens


@dataclass(frozen=True)
class Chat:
    """How rows become conversations."""

    id_field: Annotated[
        str | None, typer.Option(help="column of the row's id, which decides the split; default: its messages")
    ] = None
    ignore_fields: Annotated[
        str,
        typer.Option(
            help="comma-separated keys of rows and messages to leave unread; others that are not "
            "understood reject a row"
        ),
    ] = ""
    add_system: Annotated[
        bool, typer.Option("--add-system", help="give rows without a system message the distillation data's")
    ] = False
    prompts_of: Annotated[
        Path | None, typer.Option(help="give rows without a system message this dataset's, and its developer message")
    ] = None
    renderer: Renderer = "fast"


def flags(verb: Callable[..., None]) -> Callable[..., None]:
    """A verb whose parameters that are dataclasses are given field by field, each a flag."""
    hints = get_type_hints(verb, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}

    def called(**given: Any) -> None:
        made = {
            name: group(**{field.name: given.pop(field.name) for field in fields(group)})
            for name, group in groups.items()
        }
        verb(**made, **given)

    parameters = []
    for name, parameter in inspect.signature(verb).parameters.items():
        found = [(name, parameter.default, hints[name])]
        if name in groups:
            kinds = get_type_hints(groups[name], include_extras=True)
            found = [(field.name, field.default, kinds[field.name]) for field in fields(groups[name])]
        parameters += [
            inspect.Parameter(
                flag,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if default is MISSING else default,
                annotation=kind,
            )
            for flag, default, kind in found
        ]
    called.__name__, called.__doc__ = verb.__name__, verb.__doc__
    called.__signature__ = inspect.Signature(parameters)  # pyright: ignore[reportFunctionMemberAccess]
    called.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return called


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
    options = BuildOptions(
        **asdict(common), compact_vocab_size=compact_vocab_size, split_by=split_by, renderer=renderer
    )
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
    tokenizer: Annotated[
        Path | None, typer.Option(help="HF directory whose tokenizer.json to use instead of o200k Harmony")
    ] = None,
) -> None:
    """Build healing text: plain text -> token files with every token supervised, and a manifest."""
    kind = HealingText(
        BuildOptions(**asdict(common), tokenizer=tokenizer),
        text_field=text_field,
        id_field=id_field,
        language_field=language_field,
        languages=_names(language),
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
    _build_rows(output, source, _chat(common, chat, supervise=supervise))


@app.command()
@flags
def build_pairs(output: Output, source: Source, common: Common, chat: Chat) -> None:
    """Build preference data: rows of chosen against rejected -> token files of pairs and a manifest."""
    _build_rows(output, source, _chat(common, chat, pairs=True, supervise="last"))


@app.command()
def prompts(
    questions: Annotated[str, typer.Option("--input", help=f"rows: a file or folder ({', '.join(SUFFIXES)})")],
    dataset: Annotated[Path, typer.Option(help="whose vocabulary, system and developer messages the model was taught")],
    output: Annotated[Path, typer.Option(help="file to write; another such file is replaced")],
    field: Annotated[str, typer.Option(help="of what the user says")] = "query",
) -> None:
    """Write prompts for rollouts (rollouts.rollout_prompts): questions rendered, each with its row for the rewards."""
    typer.echo(f"{output}: {write_prompts(resolve(questions), field, dataset, output):,} prompts")


@app.command()
def compact_map(
    source: Texts,
    output_dir: Annotated[Path, typer.Option(help="folder to make")],
    size: Annotated[int, typer.Option(help="ids in all, 256 bytes and 9 special tokens among them")],
    text_field: TextField = TEXT_COLUMN,
    overwrite: Overwrite = False,
) -> None:
    """Choose the o200k ids that texts use most as a compact vocabulary: --compact-map OUTPUT_DIR/compact_vocab.npy."""
    rows = resolve(source)
    vocabularies.write_compact_map(rows, output_dir, size=size, text_field=text_field, overwrite=overwrite, say=_say)
    typer.echo(str(output_dir / vocabularies.COMPACT_MAP_NAME))


@tokenizer_app.command("train")
def train_tokenizer(
    source: Texts,
    output_dir: Annotated[Path, typer.Option(help="HF directory to make")],
    vocab_size: Annotated[int, typer.Option(help="ids in all, 256 bytes and 3 special tokens among them")],
    text_field: TextField = TEXT_COLUMN,
    overwrite: Overwrite = False,
) -> None:
    """Learn a byte-level BPE in Qwen's form from texts: vpmoe data build-text --tokenizer OUTPUT_DIR."""
    rows = resolve(source)
    vocabularies.write_bpe(
        rows, output_dir, vocab_size=vocab_size, text_field=text_field, overwrite=overwrite, say=_say
    )
    typer.echo(str(output_dir))


def _chat(common: Common, chat: Chat, *, supervise: Literal["all", "last"], pairs: bool = False) -> ChatDataset:
    given = PromptsEntry(system=Prompts().system_text() if chat.add_system else None)
    if chat.prompts_of is not None:
        if chat.add_system:
            raise DataError("two system messages", source="--add-system and --prompts-of", remedy="give one of them")
        given = read_manifest(chat.prompts_of).prompts or given
    return ChatDataset(
        BuildOptions(**asdict(common), renderer=chat.renderer),
        pairs=pairs,
        supervise=supervise,
        id_field=chat.id_field,
        system_text=given.system,
        developer_text=given.developer,
        ignore_fields=_names(chat.ignore_fields),
    )


def _build_rows(output: Output, source: Source, kind: RowKind) -> None:
    rows = resolve(source.input, source.revision, hub_config=source.hub_config, hub_split=source.hub_split)
    extent = Pass(source.shard_tokens, source.token_budget)
    manifest = build_sequential(rows, output.output_dir, kind, extent, overwrite=output.overwrite, quiet=output.quiet)
    typer.echo(summary(output.output_dir, manifest))


def _names(listed: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in listed.split(",") if name.strip())


def _say(line: str) -> None:
    typer.echo(line, err=True)
