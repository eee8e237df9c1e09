"""SYNTH rows -> Harmony conversations in parquet shards.

    python -m vpmoe.data_curation.harmony.synth_to_harmony --input <parquet dir | PleIAs/SYNTH> \\
        --output-dir data/synth_harmony --num-shards 4

Row i goes to shard ``i % num_shards``. A row that cannot become a conversation is written to ``rejects.jsonl`` with its
id and the reason; nothing is repaired. ``conversion.json`` comes last and says what was done. Where a conversion was
killed or lost its connection, the same command goes on.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path
from typing import TextIO

from megatron_vpmoe.files import json_bytes, sha256_of_json, write_atomically
from vpmoe.data_curation.conversations import store as conversations
from vpmoe.data_curation.conversations.parts import ROW_GROUPS_PER_PART, ConversionState, PartFiles
from vpmoe.data_curation.conversations.store import StoredConversation
from vpmoe.data_curation.progress import RowProgress
from vpmoe.data_curation.rows.synth import Row, RowSource, resolve
from vpmoe.errors import DataError, RowError, VpmoeError
from vpmoe.harmony.conversation import CHANNELS, Message, check_text
from vpmoe.harmony.prompts import (
    DEFAULT_IDENTITY,
    DEFAULT_INSTRUCTIONS,
    DEFAULT_KNOWLEDGE_CUTOFF,
    DEFAULT_START_DATE,
    REASONING_EFFORTS,
    Prompts,
)

RECORD_NAME = "conversion.json"
REJECTS_NAME = "rejects.jsonl"
_MIN_ROWS_FOR_EARLY_STOP = 1000
_PROGRESS_ROWS = 256


class _Refused(DataError):
    """The source itself is refused: nothing of the conversion is worth keeping."""


def to_conversation(row: Row, prompts: Prompts) -> StoredConversation:
    """One SYNTH row as a conversation.

    Raises:
        RowError: a field is missing, empty, not UTF-8, or holds NUL.
    """
    for name in ("synth_id", "query", "synthetic_reasoning", "synthetic_answer"):
        value = row.get(name)
        if isinstance(value, bytes):
            raise RowError("invalid_utf8", f"{name} is not UTF-8", source=repr(value[:80]))
        check_text(value, name)
    language = row.get("language")
    if language is not None:
        check_text(language, "language")
    messages = (
        *prompts.messages(),
        Message("user", row["query"]),
        Message("assistant", row["synthetic_reasoning"], "analysis"),
        Message("assistant", row["synthetic_answer"], "final"),
    )
    return StoredConversation(row["synth_id"], language, messages)


def convert(
    source: RowSource,
    output_dir: Path,
    *,
    num_shards: int,
    prompts: Prompts,
    strict: bool = True,
    max_reject_fraction: float = 0.001,
    overwrite: bool = False,
    quiet: bool = False,
) -> ConversionState:
    """Convert all rows of ``source`` into ``num_shards`` parquet shards under ``output_dir``.

    Where an earlier conversion of the same source was killed or dropped, it is gone on with; the shards are the same
    bytes either way.

    Raises:
        DataError: the folder is in use, the source is empty or cannot be read to its end, or (if ``strict``) too many
            rows were rejected.
    """
    if num_shards < 1:
        raise DataError(f"{num_shards} shards", source="--num-shards", remedy="use at least 1")
    _prepare(output_dir, overwrite)
    described = {"source": source.as_manifest(), "prompts": prompts.as_manifest()}
    parts = PartFiles(output_dir, num_shards, sha256_of_json(described | {"num_shards": num_shards}))
    done, limit = parts.state, max_reject_fraction if strict else None
    rejects_path = output_dir / REJECTS_NAME
    rejects_path.touch()
    try:
        with rejects_path.open("r+") as rejects:
            rejects.truncate(done.rejects_bytes)
            rejects.seek(done.rejects_bytes)
            with RowProgress("converting", source.total_rows(), quiet=quiet, done_before=done.rows_read) as progress:
                _convert_rows(source, parts, num_shards, rejects, prompts, limit, progress)
        if done.rows == 0:
            raise _Refused("no row became a conversation", source=source.name, remedy=f"see {rejects_path}")
        _check_rejects(done, limit, rejects_path)
    except _Refused:
        parts.clear()
        raise
    except BaseException:
        parts.discard()
        raise
    parts.join()
    record = described | {
        "rows": done.rows,
        "num_shards": num_shards,
        "rejects": {"count": done.rejected, "reasons": dict(sorted(done.rejects.items())), "path": REJECTS_NAME},
    }
    write_atomically(output_dir / RECORD_NAME, json_bytes(record))
    parts.clear()
    return done


def _convert_rows(
    source: RowSource,
    parts: PartFiles,
    num_shards: int,
    rejects: TextIO,
    prompts: Prompts,
    limit: float | None,
    progress: RowProgress,
) -> None:
    done = parts.state
    rows_per_part = num_shards * conversations.ROW_GROUP_ROWS * ROW_GROUPS_PER_PART
    stream = source.open(done.cursor)
    for place, row in stream:
        try:
            parts.add(done.rows_read % num_shards, to_conversation(row, prompts))
            done.rows += 1
        except RowError as error:
            done.rejects[error.reason] += 1
            entry = {
                "row": place,
                "synth_id": _printable(row.get("synth_id")),
                "reason": error.reason,
                "detail": error.what,
                "excerpt": error.source or "",
            }
            rejects.write(json.dumps(entry) + "\n")
            if done.rows_read >= _MIN_ROWS_FOR_EARLY_STOP:
                rejects.flush()
                _check_rejects(done, limit, Path(rejects.name))
        done.rows_read += 1
        if done.rows_read % _PROGRESS_ROWS == 0:
            progress.add(_PROGRESS_ROWS, 0)
        if done.rows_read % rows_per_part == 0:
            rejects.flush()
            os.fsync(rejects.fileno())
            parts.cut(stream.cursor(), rejects.tell())
    progress.add(done.rows_read % _PROGRESS_ROWS, 0)
    rejects.flush()
    parts.cut(stream.cursor(), rejects.tell())


def _check_rejects(done: ConversionState, limit: float | None, path: Path) -> None:
    seen = done.rows + done.rejected
    if limit is None or done.rejected <= limit * seen:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in done.rejects.most_common())
    raise _Refused(
        f"{done.rejected} of {seen} rows were rejected, more than the fraction {limit} ({reasons})",
        source=str(path),
        remedy="look at the rows named there; then mend the source, or pass --max-reject-fraction or --no-strict",
    )


def _prepare(output_dir: Path, overwrite: bool) -> None:
    if (output_dir / RECORD_NAME).exists() and not overwrite:
        raise DataError(
            "the folder already holds converted conversations",
            source=str(output_dir),
            remedy="pass --overwrite to replace them, or another --output-dir",
        )
    leftovers = [p for p in (output_dir / "manifest.json", output_dir / RECORD_NAME) if p.exists()]
    for path in [*leftovers, *output_dir.glob("*.parquet"), *output_dir.glob(".*.tmp")]:
        path.unlink()
    if overwrite:
        shutil.rmtree(output_dir / ".convert", ignore_errors=True)
    output_dir.mkdir(parents=True, exist_ok=True)


def _printable(synth_id: object) -> str | None:
    return None if synth_id is None else str(synth_id)


def arguments_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m vpmoe.data_curation.harmony.synth_to_harmony",
        description=(__doc__ or "").split("\n")[0],
        epilog="next: python -m vpmoe.data_curation.harmony.write_synth_harmony_manifest --dataset-dir <output-dir>",
    )
    parser.add_argument("--input", required=True, help="folder or file of parquet or JSONL, or a hub id (PleIAs/SYNTH)")
    parser.add_argument("--revision", help="commit of the hub dataset; needed for a hub id")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--num-shards", type=int, default=4)
    parser.add_argument(
        "--model-identity", default=DEFAULT_IDENTITY, help="first line of the system message; '' for none"
    )
    parser.add_argument("--knowledge-cutoff", default=DEFAULT_KNOWLEDGE_CUTOFF, help="YYYY-MM; '' for none")
    parser.add_argument("--conversation-start-date", default=DEFAULT_START_DATE, help="YYYY-MM-DD; '' for none")
    parser.add_argument("--reasoning-effort", choices=REASONING_EFFORTS, default="medium")
    parser.add_argument("--valid-channels", default=",".join(CHANNELS), help="comma-separated; '' leaves the line out")
    developer = parser.add_mutually_exclusive_group()
    developer.add_argument(
        "--developer-instructions", default=DEFAULT_INSTRUCTIONS, help="the developer message's text"
    )
    developer.add_argument("--omit-developer", action="store_true", help="no developer message at all")
    parser.add_argument("--strict", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--max-reject-fraction", type=float, default=0.001, help="with --strict, stop above this")
    parser.add_argument("--overwrite", action="store_true")
    parser.add_argument("--quiet", action="store_true", help="no progress")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 with a message that names the fault and the remedy."""
    options = arguments_parser().parse_args(argv)
    prompts = Prompts(
        model_identity=options.model_identity or None,
        knowledge_cutoff=options.knowledge_cutoff or None,
        conversation_start_date=options.conversation_start_date or None,
        reasoning_effort=options.reasoning_effort,
        valid_channels=tuple(name.strip() for name in options.valid_channels.split(",") if name.strip()),
        developer_instructions=None if options.omit_developer else options.developer_instructions,
    )
    try:
        done = convert(
            resolve(options.input, options.revision),
            options.output_dir,
            num_shards=options.num_shards,
            prompts=prompts,
            strict=options.strict,
            max_reject_fraction=options.max_reject_fraction,
            overwrite=options.overwrite,
            quiet=options.quiet,
        )
    except VpmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options.output_dir}: {done.rows:,} conversations in {options.num_shards} shards, {done.rejected} rejected")
    return 0


if __name__ == "__main__":
    sys.exit(main())
