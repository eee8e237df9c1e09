"""The one way in which every dataset is built: plan -> encode -> write -> finish, as a keyed step.

A recipe says what is built and gives it in blocks; they are written here, shard by shard, in their one order. A shard
that is whole is kept on record: a build that was killed goes on behind the last of them and ends with the same bytes.
"""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from megatron_vpmoe.files import move_into_place
from vpmoe.data_curation.datasets.encode import Block
from vpmoe.data_curation.datasets.finish import REJECTS_NAME, finish
from vpmoe.data_curation.datasets.plan import BuildOptions, shard_name
from vpmoe.data_curation.datasets.write import ShardWriter
from vpmoe.data_curation.manifest import check_files, read_manifest
from vpmoe.errors import DataError
from vpmoe.progress import Progress, hashing
from vpmoe.steps import Step, Work, check_place, run

_VERSION = 2
"""Of the code that turns rows into bytes; raised whenever the same rows would give others."""


class Recipe(Protocol):
    """How a dataset of one kind comes about.

    Attributes:
        step: what the keyed step makes.
        base: options that every kind has.
        inputs: folders and files that are read.
        shards: names of all shards, where they are known.
    """

    step: str
    base: BuildOptions
    inputs: tuple[Path, ...]
    shards: tuple[str, ...]

    def config(self) -> dict[str, Any]:
        """The options that decide bytes, for manifest and key."""
        ...

    def source(self) -> dict[str, Any]:
        """What is read, with hashes, for manifest and key."""
        ...

    def entries(self) -> dict[str, Any]:
        """What a manifest of this kind says of its own: at least ``kind``, ``split_rule``, ``prompts``."""
        ...

    def blocks(self, work: Work, done: list[dict[str, Any]]) -> Generator[Block, None, None]:
        """Lay the vocabulary into ``work.folder`` and give the blocks behind the shards that are done, in order."""
        ...

    def progress(self, done: list[dict[str, Any]], *, quiet: bool) -> Progress:
        """What shows how far the build is."""
        ...


def build_dataset(recipe: Recipe, output: Path, *, overwrite: bool = False, quiet: bool = False) -> dict[str, Any]:
    """Build a dataset in the folder ``output``; returns its manifest.

    A finished dataset of the same options and input is left as it is, an unfinished one gone on with.

    Raises:
        DataError: wrong options or input, too many rejects, no train rows, no space.
        NotOursError: something else lies in ``output``, or a dataset of another key and no ``overwrite``.
        TokenizerError: no trustworthy rank file or map.
    """
    recipe.base.check()
    check_place(output)
    step = Step(
        kind=recipe.step,
        version=_VERSION,
        output=output,
        decides={"config": recipe.config(), "source": recipe.source(), "tokenizer": recipe.base.carried_files},
        packages=recipe.base.packages,
        inputs=recipe.inputs,
    )
    # What is found, removed or gone on with is said even where no progress is wanted.
    run(step, partial(_make, recipe, quiet), overwrite=overwrite, say=partial(print, file=sys.stderr, flush=True))
    manifest = read_manifest(output)
    # A dataset that was finished without a limit passes no stricter one.
    rows, rejects = manifest["documents"]["rows_read"], manifest["rejects"]["reasons"]
    recipe.base.reject_limit.check(rejects, rows, source=str(output / REJECTS_NAME), final=True)
    return manifest


def _make(recipe: Recipe, quiet: bool, work: Work) -> dict[str, Any]:
    done = _finished_shards(work)
    try:
        with recipe.progress(done, quiet=quiet) as progress, closing(recipe.blocks(work, done)) as blocks:
            rows, rejected = sum(record["rows_read"] for record in done), Counter[str]()
            for record in done:
                rejected.update(record["rejects"])
            writer = None
            for block in blocks:
                writer = writer or ShardWriter(
                    work.folder, block.shard, recipe.base.seq_len, _rejects_of(work, block.shard)
                )
                writer.add(block)
                progress.add(block.rows_read, block.tokens)
                rows += block.rows_read
                rejected.update(reject["reason"] for reject in block.rejects)
                _check_rejects(recipe, work, writer, rejected, rows)
                if block.end is not None:
                    work.results[block.shard] = {**writer.close(), **block.end}
                    work.save()
                    writer = None
    except OSError as error:
        raise DataError(
            f"the build cannot go on: {error.strerror or error}; {_account(recipe, work)}",
            source=str(error.filename or work.folder),
            remedy="make room or mend the path, then give the same command again: it goes on with the missing shards",
        ) from error
    records = list(work.results.values())
    _write_rejects(work, work.results)
    recipe.base.reject_limit.check(rejected, rows, source=str(work.folder / REJECTS_NAME), final=True)
    return finish(work.folder, recipe.base, records, recipe.config(), recipe.source(), recipe.entries())


def _finished_shards(work: Work) -> list[dict[str, Any]]:
    """The records of shards that an earlier run finished, in order, if their files are still as that run left them."""
    records = list(work.results.values())
    remedy = f"a finished shard of the interrupted build changed: remove {work.folder} and build afresh"
    listed = [(split, counted["files"]) for record in records for split, counted in record["splits"].items()]
    with hashing(
        "checking finished shards", sum(file["bytes"] for _, files in listed for file in files.values())
    ) as tell:
        for split, files in listed:
            check_files(work.folder / split, files, remedy=remedy, tell=tell)
    return records


def _check_rejects(recipe: Recipe, work: Work, writer: ShardWriter, rejected: Mapping[str, int], rows: int) -> None:
    limit = recipe.base.reject_limit
    if limit.exceeded(sum(rejected.values()), rows):
        writer.flush_rejects()
        _write_rejects(work, [*work.results, writer.name])
        limit.check(rejected, rows, source=str(work.folder / REJECTS_NAME))


def _write_rejects(work: Work, shards: Iterable[str]) -> None:
    """List the rejected rows of shards; however many there are, they are copied from file to file."""
    partial = work.folder / f".{REJECTS_NAME}.tmp"
    with partial.open("wb") as stream:
        for name in shards:
            with _rejects_of(work, name).open("rb") as own:
                shutil.copyfileobj(own, stream)
    move_into_place(partial, work.folder / REJECTS_NAME)


def _rejects_of(work: Work, shard: str) -> Path:
    return work.scratch / f"{shard}.rejects.jsonl"


def _account(recipe: Recipe, work: Work) -> str:
    """Which shards are safe, and which are missing."""
    missing = [name for name in recipe.shards if name not in work.results]
    if not recipe.shards:
        missing = [f"{shard_name(len(work.results))} and what follows"]
    return (
        f"finished and safe: {', '.join(work.results) or 'no shard'}; "
        f"missing: {', '.join(missing) or 'only the manifest'}"
    )
