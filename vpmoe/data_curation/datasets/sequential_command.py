"""The command lines of the builders that read rows in one pass: healing text, SFT rows, preference rows."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from vpmoe.data_curation.datasets.chat import SUPERVISE, ChatDataset
from vpmoe.data_curation.datasets.kd_command import summary
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.data_curation.datasets.sequential import Job, Pass, build_sequential
from vpmoe.data_curation.datasets.text import HealingText
from vpmoe.data_curation.rows.files import TEXT_COLUMN
from vpmoe.data_curation.rows.source import SUFFIXES, resolve
from vpmoe.errors import VpmoeError
from vpmoe.harmony.choice import RENDERERS
from vpmoe.harmony.prompts import Prompts


def healing_text(argv: list[str] | None = None) -> int:
    """``build_healing_text_v1.py``; 0, or 2 with a message that names the fault and the remedy."""
    parser = _parser(
        "build_healing_text_v1.py", "Plain text -> token files with every token supervised, and a manifest"
    )
    parser.add_argument("--text-field", default=TEXT_COLUMN, help="column of the text (of text files: text)")
    parser.add_argument("--id-field", help="column of the document's id, which decides the split; default: the text")
    parser.add_argument("--language-field", help="column that names the language; needed by --language")
    parser.add_argument("--language", help="comma-separated values of that column to keep")
    parser.add_argument(
        "--drop-long", action="store_true", help="drop documents longer than --seq-len instead of cutting them"
    )
    parser.add_argument(
        "--tokenizer", type=Path, help="HF directory whose tokenizer.json to use instead of o200k Harmony"
    )

    def job(options: argparse.Namespace) -> HealingText:
        languages = tuple(name.strip() for name in (options.language or "").split(",") if name.strip())
        return HealingText(
            replace(_base(options, "fast"), tokenizer=options.tokenizer),
            text_field=options.text_field,
            id_field=options.id_field,
            language_field=options.language_field,
            languages=languages,
            drop_long=options.drop_long,
        )

    return _run(parser, argv, job)


def sft(argv: list[str] | None = None) -> int:
    """``build_sft_v1.py``; as :func:`healing_text`."""
    parser = _chat_parser("build_sft_v1.py", "Chat rows (messages, or prompt and completion) -> token files, manifest")
    parser.add_argument(
        "--supervise", choices=SUPERVISE, default="all", help="all assistant messages, or those of the last turn"
    )
    return _run(parser, argv, lambda options: _chat_job(options, pairs=False))


def preference(argv: list[str] | None = None) -> int:
    """``build_preference_v1.py``; as :func:`healing_text`."""
    parser = _chat_parser("build_preference_v1.py", "Rows of chosen against rejected -> token files of pairs, manifest")
    return _run(parser, argv, lambda options: _chat_job(options, pairs=True))


def _chat_parser(program: str, description: str) -> argparse.ArgumentParser:
    parser = _parser(program, description)
    parser.add_argument("--id-field", help="column of the row's id, which decides the split; default: its messages")
    parser.add_argument(
        "--add-system", action="store_true", help="give rows without a system message the one of the distillation data"
    )
    parser.add_argument("--renderer", choices=RENDERERS, default=BuildOptions().renderer)
    return parser


def _chat_job(options: argparse.Namespace, *, pairs: bool) -> ChatDataset:
    return ChatDataset(
        _base(options, options.renderer),
        pairs=pairs,
        supervise="last" if pairs else options.supervise,
        id_field=options.id_field,
        system_text=Prompts().system_text() if options.add_system else None,
    )


def _parser(program: str, description: str) -> argparse.ArgumentParser:
    base, extent = BuildOptions(), Pass()
    parser = argparse.ArgumentParser(
        prog=program,
        description=description,
        epilog="Killed, run the same command again: it goes on after the last finished shard.",
    )
    formats = ", ".join(SUFFIXES)
    parser.add_argument("--input", required=True, help=f"file or folder ({formats}), or a hub id")
    parser.add_argument("--revision", help="commit of the hub dataset; needed for a hub id")
    parser.add_argument("--hub-config", help="configuration of the hub dataset, if it has several")
    parser.add_argument("--hub-split", default="train", help="split of the hub dataset")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=base.seq_len, help="longest document, separator counted")
    parser.add_argument("--valid-fraction", type=float, default=base.valid_fraction)
    parser.add_argument("--token-budget", type=int, help="end before this many tokens are exceeded")
    parser.add_argument("--shard-tokens", type=int, default=extent.shard_tokens, help="tokens of a shard")
    parser.add_argument("--tokenizer-model", type=Path, help="o200k_base.tiktoken, if not in the usual places")
    parser.add_argument("--compact-map", type=Path, help="use another dataset's compact_vocab.npy")
    parser.add_argument("--padded-vocab-size", type=int, help="embedding rows of a compact vocabulary")
    parser.add_argument("--strict", action=argparse.BooleanOptionalAction, default=base.strict)
    parser.add_argument("--max-reject-fraction", type=float, default=base.max_reject_fraction)
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def _base(options: argparse.Namespace, renderer: str) -> BuildOptions:
    return BuildOptions(
        seq_len=options.seq_len,
        valid_fraction=options.valid_fraction,
        renderer=renderer,
        tokenizer_model=options.tokenizer_model,
        compact_map=options.compact_map,
        padded_vocab_size=options.padded_vocab_size,
        strict=options.strict,
        max_reject_fraction=options.max_reject_fraction,
    )


def _run(parser: argparse.ArgumentParser, argv: list[str] | None, make_job: Callable[[argparse.Namespace], Job]) -> int:
    options = parser.parse_args(argv)
    try:
        manifest = build_sequential(
            resolve(options.input, options.revision, hub_config=options.hub_config, hub_split=options.hub_split),
            options.output_dir,
            make_job(options),
            Pass(options.shard_tokens, options.token_budget),
            overwrite=options.overwrite,
            quiet=options.quiet,
        )
    except VpmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(summary(options.output_dir, manifest))
    print("  rows: " + ", ".join(f"{name} {count:,}" for name, count in manifest["documents"].items()))
    return 0
