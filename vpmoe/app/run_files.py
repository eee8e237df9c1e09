"""What lies in a run's directory beside its metrics: checkpoints, and samples that it drew while it trained."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import read_json_lines
from vpmoe.app.shown import SPAN_COLOURS, coloured
from vpmoe.errors import DataError
from vpmoe.runs.registry import checkpoints_of

_SPECIAL = re.compile(r"(<\|\w+\|>)")


def checkpoint_rows(directory: Path, *, check_hashes: bool = False) -> list[dict[str, Any]]:
    """A row a checkpoint, the newest first: whether it is whole, by names and sizes or by contents as well."""
    from megatron_vpmoe.training.checkpoint_files import damage

    rows = []
    for path in checkpoints_of(directory):
        reason = damage(path, check_hashes=check_hashes)
        files = [file for file in path.rglob("*") if file.is_file()]
        rows.append(
            {
                "checkpoint": path.name,
                "state": "sound" if reason is None else f"damaged: {reason}",
                "MiB": round(sum(file.stat().st_size for file in files) / 2**20, 1),
                "files": len(files),
                "written": datetime.fromtimestamp(path.stat().st_mtime, UTC).strftime("%Y-%m-%d %H:%M:%S"),
            }
        )
    return rows


def samples_of(directory: Path) -> list[tuple[int, str, str]]:
    """Step, prompt and completion of each line of ``samples.jsonl``; an unfinished last line is left out.

    Raises:
        DataError: a line is something else.
    """
    path = directory / "samples.jsonl"
    if not path.is_file():
        return []
    found = []
    for number, sample in read_json_lines(path):
        try:
            if "completion" in sample:
                found.append((int(sample["step"]), str(sample["prompt"]), str(sample["completion"])))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise DataError(
                f"line {number} is no sample of a run", source=f"{path}:{number}", remedy="mend or remove the line"
            ) from error
    return found


def sample_html(prompt: str, completion: str) -> str:
    """A prompt and what the model made of it, special tokens and the completion's channels apart."""
    pieces = [(part, SPAN_COLOURS["special"] if _SPECIAL.fullmatch(part) else "", "") for part in _parts(prompt)]
    channel = ""
    for before, part in zip(["", *_parts(completion)], _parts(completion), strict=False):
        if _SPECIAL.fullmatch(part):
            pieces.append((part, SPAN_COLOURS["special"], ""))
            continue
        if before == "<|channel|>":
            channel = part if part in SPAN_COLOURS else ""
        colour = SPAN_COLOURS[channel] if channel and before == "<|message|>" else SPAN_COLOURS["context"]
        pieces.append((part, colour, "completion"))
    return coloured(pieces)


def _parts(text: str) -> list[str]:
    return [part for part in _SPECIAL.split(text) if part]
