"""What the verbs that build datasets are asked: groups of options, each field of which is a flag."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import MISSING, asdict, dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.sequential import Pass
from vpmoe.data_curation.rows.source import SUFFIXES, RowSource, resolve
from vpmoe.errors import DataError

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
class Rendered:
    """Length and vocabulary; named as the fields of :class:`BuildOptions`."""

    seq_len: Annotated[int, typer.Option(help="longest document in tokens, separator counted")] = _BASE.seq_len
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="HF directory whose tokenizer.json to use instead of o200k Harmony (vpmoe tokenizer train)"),
    ] = None
    tokenizer_model: Annotated[Path | None, typer.Option(help="o200k_base.tiktoken, if not in the usual places")] = None
    compact_map: Annotated[Path | None, typer.Option(help="use another dataset's compact_vocab.npy")] = None
    padded_vocab_size: Annotated[int | None, typer.Option(help="embedding rows of the vocabulary")] = None


@dataclass(frozen=True)
class Common(Rendered):
    """What every kind of dataset of rows is asked."""

    valid_fraction: Annotated[
        float | None, typer.Option(show_default=str(_BASE.valid_fraction), help="share of the split valid")
    ] = None
    strict: Annotated[bool, typer.Option(help="stop where more rows are invalid than may be")] = _BASE.strict
    max_reject_fraction: Annotated[float, typer.Option(help="rows that may be invalid")] = _BASE.max_reject_fraction

    def options(self, **more: Any) -> BuildOptions:
        """With ``more`` fields; raises :class:`DataError` where both a fraction and a column say the split."""
        given, told = asdict(self), more.get("split_field")
        if given["valid_fraction"] is None:
            given["valid_fraction"] = _BASE.valid_fraction if told is None else 0.0
        elif told is not None:
            raise DataError(
                f"the column {told!r} says the split", source="--valid-fraction and --split-field", remedy="give one"
            )
        return BuildOptions(**given, **more)


@dataclass(frozen=True)
class Rows:
    """Where rows come from."""

    input: Annotated[str, typer.Option(help=f"file or folder ({', '.join(SUFFIXES)}), or a hub id")]
    revision: Annotated[str | None, typer.Option(help="commit of the hub dataset; needed for a hub id")] = None
    hub_config: Annotated[str | None, typer.Option(help="configuration of the hub dataset, if it has several")] = None
    hub_split: Annotated[str, typer.Option(help="split of the hub dataset")] = "train"

    def resolved(self) -> RowSource:
        """See :func:`resolve`."""
        return resolve(self.input, self.revision, hub_config=self.hub_config, hub_split=self.hub_split)


@dataclass(frozen=True)
class Source(Rows):
    """Rows, how they are split, and how far to read them."""

    split_field: Annotated[
        str | None,
        typer.Option(help="column that says the row's split, train or valid; rows of other values are left out"),
    ] = None
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


def names(listed: str) -> tuple[str, ...]:
    """What commas separate."""
    return tuple(name.strip() for name in listed.split(",") if name.strip())
