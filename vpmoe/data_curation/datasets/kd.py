"""Harmony conversations -> the token files that training reads, with a manifest that comes last.

The input shards are cut into parts (row groups); parts are encoded in any order by any number of workers and joined in
their one order, so the output does not depend on the number of workers. A finished shard leaves a receipt under
``.build/``: a build that was killed goes on after the last of them. Memory: one row group (1,024 conversations) and the
vocabulary for each worker, whatever the size of the input. Disk: the parts of the shards in work lie beside the dataset
until they are joined, so many input shards need less of it than few.
"""

from __future__ import annotations

import uuid
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from megatron_vpmoe.files import sha256_of_file, write_atomically
from vpmoe.data_curation.conversations.store import KIND as INPUT_KIND
from vpmoe.data_curation.datasets.finish import assemble_manifest, warn_of_empty_valid
from vpmoe.data_curation.datasets.folder import COMPACT_MAP_NAME, PIECES_NAME, DatasetFolder
from vpmoe.data_curation.datasets.kd_parts import PartBuilder, WorkPlan, read_receipt, receipt_path
from vpmoe.data_curation.datasets.plan import KIND, SPLITS, BuildOptions, Part, PartStats
from vpmoe.data_curation.datasets.workers import Call, Crew, make_crew
from vpmoe.data_curation.manifest import FILE_NAME, read_manifest
from vpmoe.data_curation.progress import RowProgress
from vpmoe.errors import DataError
from vpmoe.tokenizer.compact import CompactVocabulary
from vpmoe.tokenizer.interface import pieces_file_bytes
from vpmoe.tokenizer.o200k_harmony import VOCAB_SIZE, load_o200k_harmony


def build(
    input_dir: Path,
    output_dir: Path,
    options: BuildOptions,
    *,
    workers: int = 1,
    overwrite: bool = False,
    quiet: bool = False,
) -> dict[str, Any]:
    """Build the dataset in ``output_dir`` from the conversations in ``input_dir``; returns its manifest.

    A finished dataset of the same options and input is left as it is. An unfinished one is gone on with.

    Args:
        input_dir: folder with conversation shards and their manifest.
        output_dir: folder to build in.
        options: what to build.
        workers: processes; 1 works in this process.
        overwrite: throw away what ``output_dir`` holds of a dataset first.
        quiet: no progress.

    Raises:
        DataError: wrong options or input, another dataset in ``output_dir``, too many rejects, no train rows.
        TokenizerError: no trustworthy rank file or map.
    """
    options.check()
    if workers < 1:
        raise DataError(f"{workers} workers", source="--workers", remedy="use at least 1")
    source = read_manifest(input_dir, INPUT_KIND)
    state = {"config_hash": options.config_hash(), "input_manifest_sha256": sha256_of_file(input_dir / FILE_NAME)}
    load_o200k_harmony(options.tokenizer_model)  # a wrong rank file stops here, not in a worker
    folder = DatasetFolder(output_dir, KIND, state)
    with _naming_missing_shards(output_dir, len(source["shards"])), folder.exclusive():
        if overwrite:
            folder.clear()
        if (finished := folder.finished()) is not None:
            return finished
        folder.begin_or_resume()
        # A folder of this run's own: a worker of a killed run may live a moment longer and still write into its own.
        plan = WorkPlan(options, input_dir, output_dir, folder.scratch / uuid.uuid4().hex, tuple(source["shards"]))
        manifest = _finish(folder, plan, state, _receipts(plan, folder, workers, quiet))
        manifest["prompts"] = {role: source["prompts"][role] for role in ("system", "developer")}
        folder.finish(manifest)
    return manifest


def _receipts(plan: WorkPlan, folder: DatasetFolder, workers: int, quiet: bool) -> list[dict[str, Any]]:
    """Build what is missing; one receipt a shard, in order."""
    shards = range(len(plan.input_shards))
    if plan.options.compact_map is not None:
        write_atomically(plan.output_dir / COMPACT_MAP_NAME, plan.options.compact_map.read_bytes())
    with make_crew(plan, workers) as crew:
        for _ in crew.work_off(deque(Call("check_input", (shard,)) for shard in shards)):
            pass
        if plan.options.compact_vocab_size is not None and not (plan.output_dir / COMPACT_MAP_NAME).exists():
            _count_vocabulary(plan, crew, quiet)
        receipts = {shard: read_receipt(plan.output_dir, f"shard_{shard:02d}") for shard in shards}
        waiting = [shard for shard in shards if receipts[shard] is None]
        rows = sum(plan.input_shards[shard]["rows"] for shard in waiting)
        with RowProgress("building", rows, quiet=quiet) as progress:
            receipts.update(_encode_shards(plan, folder, crew, waiting, progress))
    return [receipt for _, receipt in sorted(receipts.items()) if receipt]


def _encode_shards(
    plan: WorkPlan, folder: DatasetFolder, crew: Crew, shards: list[int], progress: RowProgress
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Encode the parts of ``shards`` and yield ``(shard, receipt)`` as each is joined."""
    total_rows = sum(entry["rows"] for entry in plan.input_shards)
    limit = plan.options.max_reject_fraction * total_rows if plan.options.strict else float("inf")
    rejects: list[dict[str, Any]] = []
    found: dict[int, dict[int, PartStats]] = {shard: {} for shard in shards}
    calls = _part_calls(plan, "encode_part", shards)
    for call, result in crew.work_off(calls):
        if call.method == "finish_shard":
            yield call.arguments[0], result
            continue
        part, stats = call.arguments[0], result
        progress.add(stats.rows_read, stats.tokens)
        rejects += stats.rejects
        if len(rejects) > limit:
            _refuse_rejects(plan, folder, rejects, total_rows)
        found[part.shard][part.group] = stats
        if len(found[part.shard]) == plan.input_shards[part.shard]["row_groups"]:
            total = PartStats()
            for _, group_stats in sorted(found.pop(part.shard).items()):
                total.add(group_stats)
            calls.appendleft(Call("finish_shard", (part.shard, total)))


def _count_vocabulary(plan: WorkPlan, crew: Crew, quiet: bool) -> None:
    counts = np.zeros(VOCAB_SIZE, dtype=np.int64)
    shards = range(len(plan.input_shards))
    rows = sum(entry["rows"] for entry in plan.input_shards)
    with RowProgress("counting ids", rows, quiet=quiet) as progress:
        for _, (stats, ids, found) in crew.work_off(_part_calls(plan, "count_ids", shards)):
            counts[ids] += found
            progress.add(stats.rows_read, int(found.sum()))
    options = plan.options
    vocabulary = CompactVocabulary.from_counts(
        load_o200k_harmony(options.tokenizer_model),
        counts,
        max_size=options.compact_vocab_size,
        padded_vocab_size=options.padded_vocab_size,
    )
    vocabulary.save(plan.output_dir / COMPACT_MAP_NAME)


def _part_calls(plan: WorkPlan, method: str, shards: Iterable[int]) -> deque[Call]:
    return deque(
        Call(method, (Part(shard, group),))
        for shard in shards
        for group in range(plan.input_shards[shard]["row_groups"])
    )


def _finish(
    folder: DatasetFolder, plan: WorkPlan, state: dict[str, str], receipts: list[dict[str, Any]]
) -> dict[str, Any]:
    rejects = [reject for receipt in receipts for reject in receipt["rejects"]]
    rows = sum(receipt["rows_read"] for receipt in receipts)
    if plan.options.strict and len(rejects) > plan.options.max_reject_fraction * rows:
        _refuse_rejects(plan, folder, rejects, rows)
    folder.write_rejects(rejects)
    for split in SPLITS:
        (plan.output_dir / split).mkdir(exist_ok=True)
    tokenizer = PartBuilder(plan).tokenizer
    write_atomically(plan.output_dir / PIECES_NAME, pieces_file_bytes(tokenizer))
    manifest = assemble_manifest(plan.output_dir, plan.options, tokenizer, state, receipts)
    if manifest["splits"]["train"]["rows"] == 0:
        raise DataError(
            f"none of the {rows} rows is in the split train",
            source=f"--valid-fraction {plan.options.valid_fraction}, --seq-len {plan.options.seq_len}",
            remedy="use a smaller valid fraction; if the rows were dropped as too long, a longer --seq-len",
        )
    warn_of_empty_valid(manifest)
    return manifest


def _refuse_rejects(plan: WorkPlan, folder: DatasetFolder, rejects: list[dict[str, Any]], rows: int) -> None:
    path = folder.write_rejects(rejects)
    first = rejects[0]
    raise DataError(
        f"{len(rejects)} of {rows} rows are invalid, more than the fraction {plan.options.max_reject_fraction}; "
        f"the first: {first['synth_id']} ({first['shard']} row {first['row']}): {first['detail']}",
        source=str(path),
        remedy="mend the source, or pass a larger --max-reject-fraction, or --no-strict",
    )


@contextmanager
def _naming_missing_shards(output_dir: Path, shards: int) -> Iterator[None]:
    """A full disk or an unwritable folder ends the build with an account of what is safe and what is missing."""
    try:
        yield
    except OSError as error:
        names = [f"shard_{shard:02d}" for shard in range(shards)]
        finished = [name for name in names if receipt_path(output_dir, name).is_file()]
        missing = [name for name in names if name not in finished]
        raise DataError(
            f"the build cannot go on: {error.strerror or error}; "
            f"finished and safe: {', '.join(finished) or 'no shard'}; "
            f"missing: {', '.join(missing) or 'only the manifest'}",
            source=str(error.filename or output_dir),
            remedy="make room or mend the folder, then run the same command again: it goes on with the missing shards",
        ) from error
