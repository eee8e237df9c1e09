"""The command line of the builder: ``scripts/datasets/build_synth_kd_v1.py``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from vpmoe.data_curation.datasets.kd import build
from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.errors import VpmoeError
from vpmoe.harmony.choice import RENDERERS


def arguments_parser() -> argparse.ArgumentParser:
    """The command line."""
    defaults = BuildOptions()
    parser = argparse.ArgumentParser(
        prog="build_synth_kd_v1.py",
        description="Harmony conversations -> Megatron IndexedDatasets (tokens, lossmask, span) and manifest.json",
        epilog="Killed, run the same command again: it goes on after the last finished shard.",
    )
    parser.add_argument("--input-dir", type=Path, required=True, help="conversations with their manifest")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--seq-len", type=int, default=defaults.seq_len, help="longest document, separator counted")
    parser.add_argument("--valid-fraction", type=float, default=defaults.valid_fraction)
    parser.add_argument("--tokenizer-model", type=Path, help="o200k_base.tiktoken, if not in the usual places")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--overwrite", action="store_true", help="replace what the output folder holds")
    compact = parser.add_mutually_exclusive_group()
    compact.add_argument("--compact-vocab-size", type=int, help="count ids in train and keep this many, bytes included")
    compact.add_argument("--compact-map", type=Path, help="use another dataset's compact_vocab.npy")
    parser.add_argument("--padded-vocab-size", type=int, help="embedding rows of a compact vocabulary")
    parser.add_argument("--strict", action=argparse.BooleanOptionalAction, default=defaults.strict)
    parser.add_argument("--max-reject-fraction", type=float, default=defaults.max_reject_fraction)
    parser.add_argument("--renderer", choices=RENDERERS, default=defaults.renderer)
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 with a message that names the fault and the remedy."""
    options = arguments_parser().parse_args(argv)
    build_options = BuildOptions(
        seq_len=options.seq_len,
        valid_fraction=options.valid_fraction,
        renderer=options.renderer,
        tokenizer_model=options.tokenizer_model,
        compact_vocab_size=options.compact_vocab_size,
        compact_map=options.compact_map,
        padded_vocab_size=options.padded_vocab_size,
        strict=options.strict,
        max_reject_fraction=options.max_reject_fraction,
    )
    try:
        manifest = build(
            options.input_dir,
            options.output_dir,
            build_options,
            workers=options.workers,
            overwrite=options.overwrite,
            quiet=options.quiet,
        )
    except VpmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(summary(options.output_dir, manifest))
    return 0


def summary(output_dir: Path, manifest: dict[str, Any]) -> str:
    """What was built, in a few lines."""
    lines = [f"{output_dir}: vocabulary {manifest['tokenizer']['name']} of {manifest['tokenizer']['vocab_size']:,} ids"]
    for split, entry in manifest["splits"].items():
        spans = ", ".join(f"{name} {count:,}" for name, count in entry["span_tokens"].items())
        lines.append(f"  {split}: {entry['rows']:,} documents, {entry['tokens']:,} tokens ({spans})")
    cut = {branch: count for branch, count in manifest["truncation"].items() if count}
    lines.append("  truncation: " + ", ".join(f"{branch} {count:,}" for branch, count in cut.items()))
    lines.append(f"  rejected: {manifest['rejects']['count']:,}")
    return "\n".join(lines)
