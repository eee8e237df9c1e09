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
        int | None, typer.Option(min=1, help="rows of the embedding (default: HF's); the rest hold the mean row")
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
    tolerance: Annotated[
        float, typer.Option(min=0, help="largest logit difference, relative to the largest logit where that is above 1")
    ] = 1e-4,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run the code in HF_DIR; default: this package's own of it")
    ] = False,
) -> None:
    """Run both models in fp32 on the same tokens; exit code 1 where logits or greedy tokens are not the same."""
    found = compare_models(folder, checkpoint, greedy_steps=steps, trust_remote_code=trust_remote_code)
    typer.echo(
        f"largest logit difference {found.logits.largest:.2e} (largest logit {found.logits.scale:.2f}); greedy tokens "
        f"over {found.greedy_steps} steps {'identical' if found.greedy_identical else 'DIFFER'}"
    )
    if fault := found.fault(tolerance):
        typer.echo(f"not the same model: {fault}", err=True)
        raise typer.Exit(1)
