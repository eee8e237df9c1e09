"""SYNTH rows -> Harmony conversations in parquet shards.

    python -m vpmoe.data_curation.harmony.synth_to_harmony --input <parquet dir | PleIAs/SYNTH> \\
        --output-dir data/synth_harmony --num-shards 4

Row i goes to shard ``i % num_shards``. A row that cannot become a conversation is written to ``rejects.jsonl`` with its
id and the reason; nothing is repaired. ``conversion.json`` comes last and says what was done.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from vpmoe.data_curation.harmony.conversations import ShardWriter, StoredConversation
from vpmoe.data_curation.synth_rows import Row, RowSource, resolve
from vpmoe.errors import DataError, RowError, VpmoeError
from vpmoe.files import json_bytes, write_atomically
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
_REPORT_SECONDS = 10.0
_MIN_ROWS_FOR_EARLY_STOP = 1000


@dataclass
class Conversion:
    """What a conversion made; ``rows`` counts conversations, ``rejects`` counts reasons."""

    rows: int = 0
    rejects: Counter[str] = field(default_factory=Counter)

    @property
    def rejected(self) -> int:
        """Rows that did not become conversations."""
        return sum(self.rejects.values())


def to_conversation(row: Row, prompts: Prompts) -> StoredConversation:
    """One SYNTH row as a conversation.

    Raises:
        RowError: a field is missing, empty, not UTF-8, or holds NUL.
    """
    for name in ("synth_id", "query", "synthetic_reasoning", "synthetic_answer"):
        value = row.get(name)
        if isinstance(value, bytes):
            raise RowError("invalid_utf8", f"{name} is not UTF-8")
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
) -> Conversion:
    """Convert all rows of ``source`` into ``num_shards`` parquet shards under ``output_dir``.

    Raises:
        DataError: the folder is in use, the source is empty, or (if ``strict``) too many rows were rejected.
    """
    if num_shards < 1:
        raise DataError(f"{num_shards} shards", source="--num-shards", remedy="use at least 1")
    _prepare(output_dir, overwrite)
    done = Conversion()
    rejects_path = output_dir / REJECTS_NAME
    writers = [ShardWriter(output_dir / f"shard_{index:02d}.parquet") for index in range(num_shards)]
    try:
        with rejects_path.open("w") as rejects:
            _convert_rows(source, writers, rejects, prompts, done, max_reject_fraction if strict else None)
        if done.rows == 0:
            raise DataError("no row became a conversation", source=source.name, remedy=f"see {rejects_path}")
        _check_rejects(done, max_reject_fraction if strict else None, rejects_path)
    except BaseException:
        for writer in writers:
            writer.discard()
        raise
    for writer in writers:
        writer.close()
    record = {
        "source": source.as_manifest(),
        "prompts": prompts.as_manifest(),
        "rows": done.rows,
        "num_shards": num_shards,
        "rejects": {"count": done.rejected, "reasons": dict(sorted(done.rejects.items())), "path": REJECTS_NAME},
    }
    write_atomically(output_dir / RECORD_NAME, json_bytes(record))
    return done


def _convert_rows(source: RowSource, writers, rejects, prompts: Prompts, done: Conversion, limit: float | None) -> None:
    total = source.total_rows()
    started = reported = time.monotonic()
    for index, (place, row) in enumerate(source.rows()):
        try:
            conversation = to_conversation(row, prompts)
        except RowError as error:
            done.rejects[error.reason] += 1
            entry = {
                "row": place,
                "synth_id": _printable(row.get("synth_id")),
                "reason": error.reason,
                "detail": error.what,
            }
            rejects.write(json.dumps(entry) + "\n")
            if index >= _MIN_ROWS_FOR_EARLY_STOP:
                rejects.flush()
                _check_rejects(done, limit, Path(rejects.name))
        else:
            writers[index % len(writers)].add(conversation)
            done.rows += 1
        if time.monotonic() - reported > _REPORT_SECONDS:
            reported = time.monotonic()
            rate = (index + 1) / (reported - started)
            left = f", about {(total - index - 1) / rate:.0f} s left" if total else ""
            print(f"{index + 1:,} rows, {rate:,.0f} rows/s{left}", file=sys.stderr, flush=True)


def _check_rejects(done: Conversion, limit: float | None, path: Path) -> None:
    seen = done.rows + done.rejected
    if limit is None or done.rejected <= limit * seen:
        return
    reasons = ", ".join(f"{reason} {count}" for reason, count in done.rejects.most_common())
    raise DataError(
        f"{done.rejected} of {seen} rows were rejected, more than the fraction {limit} ({reasons})",
        source=str(path),
        remedy="look at the rows named there; then mend the source, or pass --max-reject-fraction or --no-strict",
    )


def _prepare(output_dir: Path, overwrite: bool) -> None:
    leftovers = [*output_dir.glob("*.parquet"), *output_dir.glob(".*.tmp")]
    leftovers += [p for p in (output_dir / RECORD_NAME, output_dir / "manifest.json") if p.exists()]
    if (output_dir / RECORD_NAME).exists() and not overwrite:
        raise DataError(
            "the folder already holds converted conversations",
            source=str(output_dir),
            remedy="pass --overwrite to replace them, or another --output-dir",
        )
    for path in sorted(leftovers, key=lambda p: p.suffix != ".json"):
        path.unlink()
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
        )
    except VpmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options.output_dir}: {done.rows:,} conversations in {options.num_shards} shards, {done.rejected} rejected")
    return 0


if __name__ == "__main__":
    sys.exit(main())
