"""What each job has made, checked file by file: a digest, or None where something is missing or damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import first_damage, sha256_of_file
from vpmoe.data_curation.conversations.store import KIND as CONVERSATIONS_KIND
from vpmoe.data_curation.datasets.plan import KIND as DATASET_KIND
from vpmoe.data_curation.manifest import FILE_NAME, check_file, read_manifest
from vpmoe.errors import DataError, NotOursError
from vpmoe.steps import content_sha256, read_receipt

Values = dict[str, Any]
Listed = Iterator[tuple[Path, dict[str, Any]]]


def rank_file_outputs(path: Path, sha256: str) -> Values | None:
    """The rank file, if it has the one right hash."""
    return {"sha256": sha256} if path.is_file() and sha256_of_file(path) == sha256 else None


def rows_outputs(folder: Path) -> Values | None:
    """Rows of synth_mini: the hash of their contents, if every file is as the receipt says."""
    try:
        files = read_receipt(folder)["files"]
    except NotOursError:
        return None
    return {"files": content_sha256(files)} if first_damage(folder, files, check_hashes=True) is None else None


def conversations_outputs(folder: Path) -> Values | None:
    """Harmony conversations: the hash of their manifest, if every shard is as it says."""
    manifest = _manifest(folder, CONVERSATIONS_KIND)
    if manifest is None:
        return None
    listed = ((folder / shard["name"], shard) for shard in manifest["shards"])
    return {"manifest": sha256_of_file(folder / FILE_NAME)} if _all_right(listed) else None


def dataset_outputs(folder: Path) -> Values | None:
    """A built dataset: the hash of its manifest, if every file is as it says."""
    manifest = _manifest(folder, DATASET_KIND)
    if manifest is None or not _all_right(_dataset_files(folder, manifest)):
        return None
    return {"manifest": sha256_of_file(folder / FILE_NAME)}


def training_outputs(run_directory: Path) -> Values | None:
    """A run: iteration and identity of its newest complete checkpoint."""
    # Imported here: torch and megatron.core take seconds.
    from megatron_vpmoe.training.checkpoint import find_newest

    if not (run_directory / "checkpoints").is_dir():
        return None
    found, _ = find_newest(run_directory / "checkpoints")
    if found is None:
        return None
    return {"iteration": found.iteration, "files_sha256": sha256_of_file(found.path / "files.json")}


def evaluation_outputs(report: Path) -> Values | None:
    """An evaluation: the hashes of report and picture."""
    files = {"report": report, "picture": report.with_suffix(".png")}
    if not all(path.is_file() for path in files.values()):
        return None
    return {name: sha256_of_file(path) for name, path in files.items()}


def _manifest(folder: Path, kind: str) -> dict[str, Any] | None:
    if not (folder / FILE_NAME).is_file():
        return None
    try:
        return read_manifest(folder, kind)
    except DataError:
        return None


def _dataset_files(folder: Path, manifest: dict[str, Any]) -> Listed:
    for split, content in manifest["splits"].items():
        for shard in content["shards"]:
            for name, entry in shard["files"].items():
                yield folder / split / name, entry
    tokenizer = manifest["tokenizer"]
    for entry in filter(None, (tokenizer["pieces"], tokenizer["compact_map"])):
        path = folder / entry["path"]
        size = path.stat().st_size if path.is_file() else 0
        yield path, {"bytes": size, "sha256": entry["sha256"]}


def _all_right(listed: Listed) -> bool:
    try:
        for path, entry in listed:
            check_file(path, entry, remedy="make it again")
    except DataError:
        return False
    return True
