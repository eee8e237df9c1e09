"""``vpmoe hf ...``: import, export and compare."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from vpmoe.hf import convert
from vpmoe.hf.parity import compare as compare_models
from vpmoe.weights.progress import TensorProgress
from vpmoe.weights.tensors import DTYPES

app = typer.Typer(no_args_is_help=True, add_completion=False, help="HF directories: import, export, compare.")


class Dtype(enum.StrEnum):
    """Of the written weights."""

    keep = "keep"
    float32 = "float32"
    bfloat16 = "bfloat16"


DtypeOption = Annotated[Dtype, typer.Option(help="of the weights written; keep: as they are")]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="replace what the same command made of something else")
]
CheckpointArgument = Annotated[
    Path, typer.Argument(metavar="CHECKPOINT", help="iter_NNNNNNN, or a run directory (its newest checkpoint)")
]


def _say(line: str) -> None:
    typer.echo(line, err=True)


@app.command("import")
def import_(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="a dense Qwen3 of any size, or an exported rung")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="made for it; gets iter_0000000")],
    padded_vocab_size: Annotated[
        int | None, typer.Option(help="rows of the embedding (default: HF's); the rest hold the mean row")
    ] = None,
    dtype: DtypeOption = Dtype.keep,
    overwrite: OverwriteOption = False,
) -> None:
    """Make a Megatron checkpoint from an HF directory, tensor by tensor."""
    model = convert.open_directory(folder, padded_vocab_size=padded_vocab_size, dtype=DTYPES[dtype.value])
    with TensorProgress("import", sum(t.nbytes for t in model.weights.values())) as progress:
        written = convert.import_directory(model, directory, overwrite=overwrite, progress=progress, say=_say)
    typer.echo(f"{written.path}: {len(written.tensor_sha256)} tensors, weights sha256 {written.weights_sha256}")


@app.command()
def export(
    checkpoint: CheckpointArgument,
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR", help="made for it")],
    dtype: DtypeOption = Dtype.keep,
    overwrite: OverwriteOption = False,
) -> None:
    """Make an HF directory from a checkpoint alone."""
    with TensorProgress("export", None) as progress:
        written = convert.export_checkpoint(
            checkpoint, folder, dtype=DTYPES[dtype.value], overwrite=overwrite, progress=progress, say=_say
        )
    typer.echo(f"{written.path}: {len(written.tensor_sha256)} tensors, weights sha256 {written.weights_sha256}")


@app.command()
def compare(
    folder: Annotated[Path, typer.Argument(metavar="HF_DIR")],
    checkpoint: CheckpointArgument,
    steps: Annotated[int, typer.Option(min=1, help="greedy tokens after each prompt")] = 64,
) -> None:
    """Run both models in fp32 on the same tokens: logit difference, greedy tokens."""
    found = compare_models(folder, checkpoint, greedy_steps=steps)
    typer.echo(
        f"largest logit difference {found.logit_difference:.2e} (largest logit {found.logit_scale:.2f}); greedy tokens "
        f"over {found.greedy_steps} steps {'identical' if found.greedy_identical else 'DIFFER'}"
    )
    raise typer.Exit(0 if found.greedy_identical else 1)
