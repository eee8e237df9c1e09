"""Rows of any source -> token files, in one process and one pass, shard by shard.

For sources that are read once from front to back (compressed lines, the hub) and rows whose fate hangs on earlier ones
(duplicates, a token budget). What a row becomes is a :class:`RowEncoder`'s business. A finished shard leaves a receipt
under ``.build/``: a build that was killed goes on behind its rows. Memory: a million tokens, and what the
encoder remembers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from megatron_vpmoe.files import json_bytes, sha256_of_json, write_atomically
from vpmoe.data_curation.datasets.finish import assemble_manifest, warn_of_empty_valid
from vpmoe.data_curation.datasets.folder import COMPACT_MAP_NAME, PIECES_NAME, DatasetFolder
from vpmoe.data_curation.datasets.kd_parts import read_receipt, receipt_path
from vpmoe.data_curation.datasets.plan import SPLITS, BuildOptions
from vpmoe.data_curation.datasets.shard import SequentialShard, Unit
from vpmoe.data_curation.rows.files import Row
from vpmoe.data_curation.rows.source import RowSource, RowStream
from vpmoe.data_curation.token_progress import TokenProgress
from vpmoe.errors import DataError, RowError, TokenizerError
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.from_dataset import TOKENIZER_FOLDER
from vpmoe.tokenizer.hf_directory import HFDirectory
from vpmoe.tokenizer.interface import Tokenizer, pieces_file_bytes
from vpmoe.tokenizer.o200k_harmony import load_o200k_harmony

_MIN_ROWS_FOR_EARLY_STOP = 1000
_EXCERPT_CHARACTERS = 120


class RowEncoder(Protocol):
    """What makes documents of a row.

    Attributes:
        columns: those it reads; None: all.
        truncation, documents: counts since :meth:`take_state` was called last, which are emptied by the builder.
    """

    columns: tuple[str, ...] | None
    truncation: Counter[str]
    documents: Counter[str]

    def encode(self, row: Row) -> Unit | None:
        """The row's documents; None if it was left out and counted. Raises RowError or TokenizerError: a reject."""
        ...

    def take_state(self) -> bytes:
        """What has to be remembered of the rows since the last call, for a build that goes on after them."""
        ...

    def restore(self, state: bytes) -> None:
        """Remember what :meth:`take_state` gave for one shard."""
        ...


class Job(Protocol):
    """A kind of dataset."""

    @property
    def kind(self) -> str:
        """The manifest's kind."""
        ...

    @property
    def base(self) -> BuildOptions:
        """Length, split, vocabulary and strictness."""
        ...

    def config(self) -> dict[str, Any]:
        """Everything that decides bytes, for manifest and hash."""
        ...

    def manifest_entries(self) -> dict[str, Any]:
        """Entries that a manifest of this kind has of its own."""
        ...

    def encoder(self, tokenizer: Tokenizer) -> RowEncoder:
        """A fresh encoder."""
        ...


@dataclass(frozen=True, slots=True)
class Pass:
    """How far the pass goes.

    Attributes:
        shard_tokens: a shard ends with the row that reaches this many tokens; what a restart may have to do again.
        token_budget: the build ends before the row that would exceed this many tokens, all splits together.
    """

    shard_tokens: int = 50_000_000
    token_budget: int | None = None

    def check(self) -> None:
        """Raises :class:`DataError` for sizes below 1."""
        for flag, value in (("--shard-tokens", self.shard_tokens), ("--token-budget", self.token_budget)):
            if value is not None and value < 1:
                raise DataError(f"{flag} {value} holds nothing", source="command line", remedy="use at least 1")


def build_sequential(
    source: RowSource, output_dir: Path, job: Job, extent: Pass, *, overwrite: bool = False, quiet: bool = False
) -> dict[str, Any]:
    """Build the dataset in ``output_dir``; returns its manifest.

    A finished dataset of the same options and input is left as it is. An unfinished one is gone on with.

    Raises:
        DataError: wrong options or input, another dataset in the folder, too many rejects, no train rows, no space.
        TokenizerError: no trustworthy rank file or map.
    """
    job.base.check()
    extent.check()
    origin = source.as_manifest()
    config = {**job.config(), "shard_tokens": extent.shard_tokens, "token_budget": extent.token_budget}
    state = {"config_hash": sha256_of_json(config), "input_manifest_sha256": sha256_of_json(origin)}
    folder = DatasetFolder(output_dir, job.kind, state)
    with folder.exclusive():
        if overwrite:
            folder.clear()
        if (finished := folder.finished()) is not None:
            return finished
        folder.begin_or_resume()
        tokenizer = _tokenizer(folder.path, job.base)
        receipts = _Builder(source, folder, job, extent, tokenizer).receipts(quiet)
        manifest = _manifest(folder, job, tokenizer, state, receipts)
        folder.finish(manifest | {"config": config, "source": origin})
    return manifest | {"config": config, "source": origin}


class _Builder:
    """One build: reads rows, fills shards, leaves receipts."""

    def __init__(self, source: RowSource, folder: DatasetFolder, job: Job, extent: Pass, tokenizer: Tokenizer) -> None:
        self._source, self._folder, self._job, self._extent = source, folder, job, extent
        self._encoder = job.encoder(tokenizer)
        self._receipts: list[dict[str, Any]] = []
        self._rows_read = self._tokens = self._rejected = 0

    def receipts(self, quiet: bool) -> list[dict[str, Any]]:
        """Build what is missing; one receipt a shard, in order."""
        self._resume()
        if self._receipts and self._receipts[-1]["ended"]:
            return self._receipts
        budget = self._extent.token_budget
        progress = TokenProgress(self._job.kind, self._source, budget, begun_with=self._tokens, quiet=quiet)
        if self._receipts:
            progress.going_on(self._rows_read)
        stream = self._source.open(self._encoder.columns, self._receipts[-1]["cursor"] if self._receipts else None)
        rows = iter(stream)
        try:
            while not self._one_shard(stream, rows, progress):
                pass
        except OSError as error:
            raise DataError(
                f"writing or reading stopped: {error}; {len(self._receipts)} shards are finished and stay valid",
                source=str(self._folder.path),
                remedy="make room (or mend the permissions) and run the same command again: it goes on from there",
            ) from error
        progress.end()
        return self._receipts

    def _resume(self) -> None:
        while (receipt := read_receipt(self._folder.path, f"shard_{len(self._receipts):02d}")) is not None:
            self._encoder.restore(_state_path(self._folder.path, receipt["name"]).read_bytes())
            self._receipts.append(receipt)
            self._rows_read += receipt["rows_read"]
            self._rejected += len(receipt["rejects"])
            self._tokens += sum(split["tokens"] for split in receipt["splits"].values())

    def _one_shard(self, stream: RowStream, rows: Iterator[tuple[str, Row]], progress: TokenProgress) -> bool:
        """Fill the next shard; True if the source or the budget ended with it."""
        name = f"shard_{len(self._receipts):02d}"
        shard = SequentialShard(name, self._folder.scratch, self._job.base.seq_len)
        rejects: list[dict[str, Any]] = []
        rows_before, ended = self._rows_read, True
        for place, row in rows:
            unit = None
            counted = Counter(self._encoder.truncation), Counter(self._encoder.documents)
            try:
                unit = self._encoder.encode(row)
            except (RowError, TokenizerError) as error:
                rejects.append(reject_entry(place, row, error))
                self._rejected += 1
                if self._rows_read >= _MIN_ROWS_FOR_EARLY_STOP:
                    self._check_rejects(rejects, self._rows_read + 1)
            budget = self._extent.token_budget
            if unit is not None and budget is not None and self._tokens + unit.tokens > budget:
                self._encoder.truncation, self._encoder.documents = counted  # it is not part of the dataset
                break
            self._rows_read += 1
            if unit is not None:
                shard.add(unit)
                self._tokens += unit.tokens
            progress.show(1, unit.tokens if unit is not None else 0)
            if shard.tokens >= self._extent.shard_tokens:
                ended = False
                break
        if ended:
            self._check_rejects(rejects, max(self._rows_read, 1))
        receipt = {
            "name": name,
            "rows_read": self._rows_read - rows_before,
            "splits": shard.close(self._folder.path),
            "truncation": dict(self._encoder.truncation),
            "documents": dict(self._encoder.documents),
            "rejects": rejects,
            "ended": ended,
            "cursor": stream.cursor(),
        }
        self._encoder.truncation.clear()
        self._encoder.documents.clear()
        write_atomically(_state_path(self._folder.path, name), self._encoder.take_state())
        write_atomically(receipt_path(self._folder.path, name), json_bytes(receipt))
        self._receipts.append(receipt)
        return ended

    def _check_rejects(self, current: list[dict[str, Any]], rows: int) -> None:
        base = self._job.base
        if not base.strict or self._rejected <= base.max_reject_fraction * rows:
            return
        rejects = [reject for receipt in self._receipts for reject in receipt["rejects"]] + current
        path = self._folder.write_rejects(rejects)
        raise DataError(
            f"{len(rejects)} of {rows} rows are invalid, more than the fraction {base.max_reject_fraction}; "
            f"the first: {rejects[0]['row']}: {rejects[0]['detail']}",
            source=str(path),
            remedy="mend the source, or pass a larger --max-reject-fraction, or --no-strict",
        )


def reject_entry(place: str, row: Row, error: RowError | TokenizerError) -> dict[str, Any]:
    """A rejected row as ``rejects.jsonl`` lists it: where, why, and how it begins."""
    return {
        "row": place,
        "reason": error.reason if isinstance(error, RowError) else "untokenizable",
        "detail": error.what,
        "excerpt": ascii(dict(row))[:_EXCERPT_CHARACTERS],
    }


def _state_path(output_dir: Path, shard: str) -> Path:
    return output_dir / ".build" / f"{shard}.state"


def _tokenizer(output_dir: Path, base: BuildOptions) -> Tokenizer:
    if base.tokenizer is not None:
        for file in HFDirectory(base.tokenizer).files:
            write_atomically(output_dir / TOKENIZER_FOLDER / file.name, file.read_bytes())
        return HFDirectory(output_dir / TOKENIZER_FOLDER, base.padded_vocab_size)
    full = load_o200k_harmony(base.tokenizer_model)
    if base.compact_map is None:
        return full
    write_atomically(output_dir / COMPACT_MAP_NAME, base.compact_map.read_bytes())
    return CompactVocabulary.load(full, output_dir / COMPACT_MAP_NAME, padded_vocab_size=base.padded_vocab_size)


def _manifest(
    folder: DatasetFolder, job: Job, tokenizer: Tokenizer, state: dict[str, str], receipts: list[dict[str, Any]]
) -> dict[str, Any]:
    folder.write_rejects([reject for receipt in receipts for reject in receipt["rejects"]])
    for split in SPLITS:
        (folder.path / split).mkdir(exist_ok=True)
    write_atomically(folder.path / PIECES_NAME, pieces_file_bytes(tokenizer))
    manifest = assemble_manifest(folder.path, job.base, tokenizer, state, receipts)
    documents: Counter[str] = Counter()
    for receipt in receipts:
        documents.update(receipt["documents"])
    manifest |= {"kind": job.kind, "documents": {"rows_read": sum(r["rows_read"] for r in receipts), **documents}}
    manifest |= job.manifest_entries()
    if manifest["splits"]["train"]["rows"] == 0:
        raise DataError(
            f"none of the {manifest['documents']['rows_read']} rows is in the split train",
            source=f"--valid-fraction {job.base.valid_fraction}, --seq-len {job.base.seq_len}",
            remedy="use a smaller valid fraction, a larger token budget, or, if rows were dropped as too long, "
            "a longer --seq-len",
        )
    warn_of_empty_valid(manifest)
    return manifest
