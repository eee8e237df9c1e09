"""``vpmoe eval core8``, ``canaries``, ``text``, ``stories`` and ``lm-eval``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from megatron_vpmoe.errors import ConfigError

WhereArgument = Annotated[
    Path,
    typer.Argument(
        metavar="WHERE",
        help="a run (its newest checkpoint), one checkpoint, an object of a ladder, or an HF directory",
    ),
]
SystemOption = Annotated[
    str | None, typer.Option(help='system message instead of the one stored with the model; "" for none')
]
DeveloperOption = Annotated[
    str | None, typer.Option(help='developer message instead of the one stored with the model; "" for none')
]
PlainOption = Annotated[
    bool, typer.Option("--plain", help="ask as plain text (Question: ... Answer:), not as a conversation")
]
PassageOption = Annotated[
    bool,
    typer.Option("--passage", help="ask in plain text that is to be gone on with: a model that was only pretrained"),
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace a finished report")]
Precision = Annotated[
    bool | None, typer.Option("--bf16/--fp32", help="compute so (default: as the run did, other models in fp32)")
]

Int8Option = Annotated[
    bool, typer.Option("--int8", help="int8 weights in the linear layers of a mixture or a state space model, on a CPU")
]
StoreOption = Annotated[
    Path | None,
    typer.Option(dir_okay=False, help="where the store of a mixture's run lies now (default: where the run had it)"),
]
CompileOption = Annotated[
    bool, typer.Option("--compile", help="compile the decoding steps of a mixture or a state space model")
]


def core8(
    where: WhereArgument,
    config: Annotated[Path, typer.Option(help="settings of the suite")] = Path("configs/eval/core8.toml"),
    size: Annotated[str, typer.Option(help="items of each task: smoke (50), full (500), all")] = "smoke",
    tasks: Annotated[
        str | None,
        typer.Option(help="names with commas between, of any tasks of the bundle, or all (default: those of CORE-8)"),
    ] = None,
    bundle: Annotated[
        Path | None, typer.Option(help="folder of the CORE bundle (default: the public one, fetched once)")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="continuations that a process scores at once (default: of the settings)")
    ] = None,
    context: Annotated[
        int | None,
        typer.Option(min=2, help="longer prompts lose their beginning (default: as the model was trained; else never)"),
    ] = None,
    bf16: Precision = None,
    output: Annotated[
        Path | None, typer.Option(help="the report (default: reports/eval/core8/CHECKPOINT.json)")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Eight tasks of the CORE benchmark by its rules: accuracy, centered accuracy, their mean, 95 % intervals.

    Under torchrun the processes share the items out (scripts/eval/run_core8.sh with NPROC does it).
    """
    from vpmoe.eval.suites.core8 import Chosen, Settings, evaluate, summary_lines

    names = _names(tasks)
    chosen = Chosen(size, names, bundle, batch_size, context, bf16, output, overwrite)
    report = evaluate(where, Settings.read(config), chosen, say=say_once)
    say_once(summary_lines(report), err=False)


def canaries(
    where: WhereArgument,
    config: Annotated[Path, typer.Option(help="settings and pinned prompts")] = Path("configs/eval/canaries.toml"),
    size: Annotated[str, typer.Option(help="items of each level: smoke (4), full (32), all")] = "smoke",
    tasks: Annotated[
        str | None,
        typer.Option(
            help="some, with commas between: special_tokens_as_text, copying, special_tokens, harmony, pinned, and "
            "synth_mini's families"
        ),
    ] = None,
    against: Annotated[
        Path | None, typer.Option(help="a report of this suite, or a model: where the pinned answers part from its")
    ] = None,
    system: SystemOption = None,
    developer: DeveloperOption = None,
    plain: PlainOption = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="a longer answer is cut (default: of the settings)")
    ] = None,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="answers that a process decodes at once (default: of the settings)")
    ] = None,
    context: Annotated[
        int | None, typer.Option(min=2, help="tokens of prompt and answer together (default: as trained, else any)")
    ] = None,
    bf16: Precision = None,
    output: Annotated[
        Path | None, typer.Option(help="the report (default: reports/eval/canaries/CHECKPOINT.json)")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Copying, special tokens in text, Harmony of samples, synth_mini by family and level, and pinned prompts.

    Lengths and repetition of all answers too. Under torchrun the processes share the questions out
    (scripts/eval/run_canaries.sh with NPROC does it).
    """
    from vpmoe.eval.suites.canaries import Chosen, Settings, evaluate
    from vpmoe.eval.suites.canary_entries import summary_lines

    names = _names(tasks)
    asked = {"system": system, "developer": developer, "plain": plain, "max_new_tokens": max_new_tokens}
    how = {"batch_size": batch_size, "context": context, "bf16": bf16, "output": output, "overwrite": overwrite}
    report = evaluate(where, Settings.read(config), Chosen(size, names, against, **asked, **how), say=say_once)
    say_once(summary_lines(report), err=False)


def text(
    where: WhereArgument,
    texts: Annotated[Path | None, typer.Option(help="file or folder of .txt, .jsonl, .jsonl.zst or .parquet")] = None,
    data_path: Annotated[Path | None, typer.Option(help="instead: a dataset of conversations, span by span")] = None,
    split: Annotated[str, typer.Option(help="of the dataset")] = "valid",
    text_field: Annotated[str, typer.Option(help="column of the text")] = "text",
    documents: Annotated[int | None, typer.Option(min=1, help="so many of the first (default: all)")] = None,
    window: Annotated[
        int | None, typer.Option(min=2, help="tokens of a text read at once (default: as trained, else 2048)")
    ] = None,
    stride: Annotated[int | None, typer.Option(min=1, help="tokens between windows (default: half of one)")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="windows that a process reads at once")] = 8,
    bf16: Precision = None,
    int8: Int8Option = False,
    store: StoreOption = None,
    output: Annotated[
        Path | None, typer.Option(help="the report (default: reports/eval/text/CHECKPOINT[_int8].json)")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Nats a token, perplexity and bits per byte, by position, of texts or of a dataset's conversations."""
    from vpmoe.eval.suites.text import Asked, evaluate, summary_lines

    asked = Asked(texts, data_path, split, text_field, documents, window, stride, batch_size, bf16, output, overwrite)
    say_once(summary_lines(evaluate(where, asked, say=say_once, int8=int8, store=store)), err=False)


def stories(
    where: WhereArgument,
    prompts: Annotated[Path, typer.Option(help="rows of vpmoe data story-prompts")],
    split: Annotated[str, typer.Option(help="of the rows")] = "test",
    limit: Annotated[int | None, typer.Option(min=1, help="so many of the first (default: all)")] = None,
    passage: PassageOption = False,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy")] = 0.8,
    top_p: Annotated[float, typer.Option(help="draw among the most likely tokens of this total probability")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draw, with a temperature")] = 0,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="a longer story is cut")] = 256,
    batch_size: Annotated[int, typer.Option(min=1, help="stories that a process writes at once")] = 64,
    samples: Annotated[int, typer.Option(min=0, help="stories kept in the report")] = 8,
    bf16: Precision = None,
    output: Annotated[
        Path | None, typer.Option(help="the report (default: reports/eval/stories/CHECKPOINT.json)")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Stories to held-out prompts: how many have the required words, the right protagonist, and no banned word."""
    from vpmoe.eval.suites.stories import Asked, evaluate, summary_lines

    draw = {"temperature": temperature, "top_p": top_p, "seed": seed, "max_new_tokens": max_new_tokens}
    how = {"batch_size": batch_size, "samples": samples, "bf16": bf16, "output": output, "overwrite": overwrite}
    report = evaluate(where, Asked(prompts, split, limit, passage, **draw, **how), say=say_once)
    say_once(summary_lines(report), err=False)


def lm_eval(
    where: WhereArgument,
    tasks: Annotated[str, typer.Option(help="names of lm-eval's tasks, with commas between")],
    include_path: Annotated[Path | None, typer.Option(help="folder with YAML of tasks of your own")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="items of each task (default: all)")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="sequences that a process has in work at once")] = 32,
    context: Annotated[
        int | None, typer.Option(min=2, help="tokens of a sequence (default: as trained, else 2048)")
    ] = None,
    bf16: Precision = None,
    output: Annotated[
        Path | None, typer.Option(help="the report (default: reports/eval/lm_eval/CHECKPOINT.json)")
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Tasks of lm-eval (pip install lm-eval) on the model itself, without an export."""
    try:
        from vpmoe.eval.suites.lm_eval_model import evaluate, summary_lines
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "lm_eval":
            raise
        raise ConfigError(
            "lm-eval is not installed", source="vpmoe eval lm-eval", remedy="pip install lm-eval"
        ) from error

    report = evaluate(
        where,
        _names(tasks),
        include_path=include_path,
        limit=limit,
        batch_size=batch_size,
        context=context,
        bf16=bf16,
        output=output,
        overwrite=overwrite,
        say=say_once,
    )
    say_once(summary_lines(report), err=False)


def _names(tasks: str | None) -> tuple[str, ...]:
    """Those that stand with commas between."""
    return () if tasks is None else tuple(name.strip() for name in tasks.split(","))


def say_once(line: str, *, err: bool = True) -> None:
    """Print a line, of several processes by the first alone."""
    if int(os.environ.get("RANK", "0")) == 0:
        typer.echo(line, err=err)
