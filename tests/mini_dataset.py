"""Synthetic conversations and their dataset in a compact vocabulary, made by the commands."""

from __future__ import annotations

from pathlib import Path

from vpmoe.cli import main

PADDED_VOCAB, SEQ_LENGTH = 448, 192
"""Of the dataset."""


def write_mini(folder: Path) -> Path:
    """rows/, conversations/ and dataset/ in ``folder``."""
    rows, conversations, dataset = (str(folder / name) for name in ("rows", "conversations", "dataset"))
    assert main(["data", "synth-mini", "--output-dir", rows, "--rows", "300"]) == 0
    convert = ["--input", rows, "--output-dir", conversations, "--num-shards", "1", "--reasoning-effort", "low"]
    assert main(["data", "convert", *convert]) == 0
    vocabulary = ["--compact-vocab-size", "400", "--padded-vocab-size", f"{PADDED_VOCAB}", "--valid-fraction", "0.1"]
    build = ["--input-dir", conversations, "--output-dir", dataset, "--seq-len", f"{SEQ_LENGTH}", "--workers", "1"]
    assert main(["data", "build", *build, "--quiet", *vocabulary]) == 0
    return folder
