"""``vpmoe data annotate``, ``score`` and ``build-store``: the verbs of ``vpmoe data`` that need a model."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import typer

from megatron_vpmoe.manifest import read_manifest
from vpmoe.data_curation.app import app
from vpmoe.data_curation.datasets.options import Overwrite, Quiet
from vpmoe.harmony.prompts import ReasoningEffort

_say = partial(print, file=sys.stderr, flush=True)


@app.command("build-store")
def build_store(
    datasets: Annotated[list[Path], typer.Argument(help="of token files, such as vpmoe data build makes")],
    embedding: Annotated[
        Path, typer.Option(help="a model over whose embedding the experts are: its run, a checkpoint")
    ],
    output: Annotated[Path, typer.Option(help="file of the store")],
    chunk: Annotated[int, typer.Option(min=1, help="tokens of a chunk")] = 32,
    capacity: Annotated[int | None, typer.Option(min=1, help="vectors at most, the newest (default: all)")] = None,
    overwrite: Overwrite = False,
) -> None:
    """Make the store of vectors that a mixture reads: one of each chunk of every training document.

    Train with --store FILE and --memory-entries K.
    """
    for dataset in datasets:
        read_manifest(dataset)
    from vpmoe.teacher import build_store as building

    store = building.build_store(datasets, embedding, output, chunk=chunk, capacity=capacity, overwrite=overwrite)
    typer.echo(f"{output}: {len(store):,} vectors of {chunk} tokens each")


@app.command()
def annotate(
    dataset: Annotated[Path, typer.Argument(help="of token files, such as preference pairs")],
    reference: Annotated[
        Path, typer.Option(help="a run, a checkpoint, an object of a ladder, or an HF directory, of its vocabulary")
    ],
    output_dir: Annotated[Path, typer.Option(help="folder of the annotated dataset")],
    bf16: Annotated[
        bool | None,
        typer.Option("--bf16/--no-bf16", help="precision (default: as the reference was trained, else fp32)"),
    ] = None,
    rows: Annotated[int, typer.Option(min=1, help="rows of the dataset's seq_length scored together")] = 8,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Have a frozen model score every label ahead of time: a dataset that dpo trains on without a second model.

    The dataset stays as it is; the annotated one shares its token files. A killed command goes on where it was.
    """
    read_manifest(dataset)  # a wrong path is told before torch is loaded
    from vpmoe.teacher.reference import annotate_with_reference

    made = annotate_with_reference(
        dataset, reference, output_dir, bf16=bf16, rows=rows, overwrite=overwrite, quiet=quiet, say=_say
    )
    names = ", ".join(one.name for one in made.annotations)
    typer.echo(f"{output_dir}: {sum(entry.rows for entry in made.splits.values()):,} documents with {names}")


@app.command()
def score(
    dataset: Annotated[Path, typer.Argument(help="of token files, such as vpmoe data build makes")],
    teacher: Annotated[
        str, typer.Option(help="a run, checkpoint, object of a ladder or HF directory; or the address of a server")
    ],
    output_dir: Annotated[Path, typer.Option(help="folder of the scored dataset")],
    by: Annotated[
        Literal["megatron", "hf", "server"] | None,
        typer.Option(help="megatron: a model of ours; hf: any AutoModelForCausalLM directory; server: http(s)://..."),
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="ids of each position")] = 64,
    temperature: Annotated[float, typer.Option(help="that the teacher's logits are divided by")] = 1.0,
    coding: Annotated[
        Literal["exact", "compact"], typer.Option(help="fp32, or 199 bytes of a position at K = 64")
    ] = "compact",
    reasoning: Annotated[
        ReasoningEffort | None, typer.Option(help="effort that the teacher's system message asks for (default: stored)")
    ] = None,
    fraction: Annotated[float | None, typer.Option(min=0, max=1, help="score this share of conversations")] = None,
    token_budget: Annotated[int | None, typer.Option(min=1, help="score at most so many supervised tokens")] = None,
    selection: Annotated[Path | None, typer.Option(help="score the documents of this list (lines: train 17)")] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="tokens that a model scores together")] = 16384,
    workers: Annotated[int, typer.Option(min=1, help="processes with a model each, on a GPU each")] = 1,
    bf16: Annotated[
        bool | None, typer.Option("--bf16/--no-bf16", help="precision (default: as it was trained or saved)")
    ] = None,
    device: Annotated[str | None, typer.Option(help="of hf, such as cuda:1 (default: the GPU, else the CPU)")] = None,
    memory_gb: Annotated[
        float | None, typer.Option(min=0, help="of hf: keep so much of its layers, read the others from disk")
    ] = None,
    served_model: Annotated[str | None, typer.Option(help="of a server: the name of the model")] = None,
    teacher_tokenizer: Annotated[
        Path | None, typer.Option(help="of a server: folder of its tokenizer.json, to compare every id")
    ] = None,
    concurrency: Annotated[int, typer.Option(min=1, help="of a server: requests under way")] = 16,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Have a teacher say its likeliest next tokens at every supervised position: a dataset that topk_kd trains on.

    The dataset stays as it is; the scored one shares its token files. A killed command goes on where it was.
    """
    read_manifest(dataset)
    from vpmoe.data_curation import manifest as manifests
    from vpmoe.teacher.find import find_teacher
    from vpmoe.teacher.selection import Selection
    from vpmoe.teacher.store import score_dataset

    of_models = {"bf16": bf16, "tokens": batch_tokens, "device": device, "memory_gb": memory_gb}
    of_models |= {"workers": workers}
    of_servers = {"model": served_model, "tokenizer": teacher_tokenizer, "concurrency": concurrency}
    score_dataset(
        dataset,
        find_teacher(teacher, by, **of_models, **of_servers),
        output_dir,
        count=top_k,
        temperature=temperature,
        coding=coding,
        reasoning=reasoning,
        selection=Selection(fraction, token_budget, selection),
        overwrite=overwrite,
        quiet=quiet,
        say=_say,
    )
    told = manifests.read_manifest(output_dir)["annotated"][-1]
    typer.echo(
        f"{output_dir}: {told['positions']:,} positions of {told['documents']:,} documents, {told['bytes_a_position']} "
        f"bytes each; captured mass {told['mean_captured_mass']:.4f}, KL of the coding {told['mean_coding_kl']:.1e}"
    )
