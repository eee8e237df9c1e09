"""``vpmoe data convert``, and the manifest of conversations that another program wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vpmoe.data_curation.conversations.convert import DEFAULT_LIMIT
from vpmoe.data_curation.conversations.convert import convert as convert_rows
from vpmoe.data_curation.conversations.manifest import check_or_write_manifest
from vpmoe.data_curation.conversations.synth import resolve_synth
from vpmoe.data_curation.manifest import FILE_NAME
from vpmoe.data_curation.reject_limit import RejectLimit
from vpmoe.harmony.conversation import CHANNELS
from vpmoe.harmony.prompts import (
    DEFAULT_IDENTITY,
    DEFAULT_INSTRUCTIONS,
    DEFAULT_KNOWLEDGE_CUTOFF,
    DEFAULT_START_DATE,
    Prompts,
    ReasoningEffort,
)


def convert(
    source: Annotated[str, typer.Option("--input", help="folder or file of parquet or JSONL, or a hub id")],
    output_dir: Annotated[Path, typer.Option(help="folder to write")],
    revision: Annotated[str | None, typer.Option(help="commit of the hub dataset; needed for a hub id")] = None,
    num_shards: Annotated[int, typer.Option(help="parquet files to write")] = 4,
    model_identity: Annotated[
        str, typer.Option(help="first line of the system message; '' for none")
    ] = DEFAULT_IDENTITY,
    knowledge_cutoff: Annotated[str, typer.Option(help="YYYY-MM; '' for none")] = DEFAULT_KNOWLEDGE_CUTOFF,
    conversation_start_date: Annotated[str, typer.Option(help="YYYY-MM-DD; '' for none")] = DEFAULT_START_DATE,
    reasoning_effort: Annotated[ReasoningEffort, typer.Option(help="of the system message")] = "medium",
    valid_channels: Annotated[
        str, typer.Option(help="comma-separated, of the system message; '' leaves the line out")
    ] = ",".join(CHANNELS),
    developer_instructions: Annotated[
        str | None, typer.Option(show_default=DEFAULT_INSTRUCTIONS, help="the developer message's text")
    ] = None,
    omit_developer: Annotated[bool, typer.Option("--omit-developer", help="no developer message at all")] = False,
    strict: Annotated[bool, typer.Option(help="stop when more rows are rejected than are allowed")] = True,
    max_reject_fraction: Annotated[float, typer.Option(help="with --strict, the allowed fraction")] = (
        DEFAULT_LIMIT.fraction or 0.0
    ),
    overwrite: Annotated[bool, typer.Option("--overwrite", help="replace conversations of other input or options")] = (
        False
    ),
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Turn SYNTH rows into Harmony conversations: parquet shards with a manifest, which datasets are built from.

    A conversion that was killed, dropped or refused is gone on with by the same command.
    """
    if omit_developer and developer_instructions is not None:
        raise typer.BadParameter("--developer-instructions and --omit-developer exclude one another")
    if developer_instructions is None and not omit_developer:
        developer_instructions = DEFAULT_INSTRUCTIONS
    prompts = Prompts(
        model_identity=model_identity or None,
        knowledge_cutoff=knowledge_cutoff or None,
        conversation_start_date=conversation_start_date or None,
        reasoning_effort=reasoning_effort,
        valid_channels=tuple(name.strip() for name in valid_channels.split(",") if name.strip()),
        developer_instructions=developer_instructions,
    )
    manifest = convert_rows(
        resolve_synth(source, revision),
        output_dir,
        num_shards=num_shards,
        prompts=prompts,
        limit=RejectLimit(max_reject_fraction if strict else None),
        overwrite=overwrite,
        quiet=quiet,
        say=typer.echo,
    )
    typer.echo(
        f"{output_dir}: {manifest['rows']:,} conversations in {len(manifest['shards'])} shards, "
        f"{manifest['rejects']['count']} rejected"
        + (f"; {repeated:,} have the synth_id of another" if (repeated := manifest.get("repeated_ids", 0)) else "")
    )


def write_manifest(
    dataset_dir: Annotated[Path, typer.Option(help="folder of conversation shards")],
) -> None:
    """Check the manifest of conversations against them; write it for a folder of shards that has none."""
    manifest = check_or_write_manifest(dataset_dir)
    typer.echo(f"{dataset_dir / FILE_NAME}: {manifest['rows']:,} rows, {manifest['bytes']:,} bytes")
