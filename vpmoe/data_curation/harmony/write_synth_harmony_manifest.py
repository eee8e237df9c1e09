"""Write the manifest of converted conversations: what they come from, and rows, bytes and sha256 of each shard.

    python -m vpmoe.data_curation.harmony.write_synth_harmony_manifest --dataset-dir data/synth_harmony

The builder reads nothing without it, and refuses shards that changed after it was written.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from megatron_vpmoe.files import file_entry
from megatron_vpmoe.software import git_state
from vpmoe.data_curation.conversations.store import KIND, SCHEMA_VERSION, open_shard
from vpmoe.data_curation.harmony.synth_to_harmony import RECORD_NAME
from vpmoe.data_curation.manifest import write_manifest
from vpmoe.errors import DataError, VpmoeError


def write_conversations_manifest(dataset_dir: Path) -> dict[str, Any]:
    """Hash the shards in ``dataset_dir`` and write ``manifest.json``; returns it.

    Raises:
        DataError: the conversion did not finish, or shards are missing or hold another number of rows than it wrote.
    """
    record = _record(dataset_dir / RECORD_NAME)
    names = [f"shard_{index:02d}.parquet" for index in range(record["num_shards"])]
    found = sorted(path.name for path in dataset_dir.glob("*.parquet"))
    if sorted(names) != found:
        raise DataError(
            f"the folder holds {', '.join(found) or 'no shard'}; the conversion wrote {', '.join(names)}",
            source=str(dataset_dir),
            remedy="convert again with --overwrite",
        )
    shards = [_shard_entry(dataset_dir / name) for name in names]
    rows = sum(shard["rows"] for shard in shards)
    if rows != record["rows"]:
        raise DataError(
            f"the shards hold {rows} rows, the conversion wrote {record['rows']}",
            source=str(dataset_dir),
            remedy="convert again with --overwrite",
        )
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "kind": KIND,
        "source": record["source"],
        "prompts": record["prompts"],
        "rows": rows,
        "bytes": sum(shard["bytes"] for shard in shards),
        "shards": shards,
        "rejects": record["rejects"],
        "git": git_state(),
    }
    write_manifest(dataset_dir, manifest)
    return manifest


def _record(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(
            f"there is no {RECORD_NAME}: the conversion was not run or did not finish",
            source=str(path.parent),
            remedy="run python -m vpmoe.data_curation.harmony.synth_to_harmony first",
        ) from error


def _shard_entry(path: Path) -> dict[str, Any]:
    metadata = open_shard(path).metadata
    return {"name": path.name, "rows": metadata.num_rows, "row_groups": metadata.num_row_groups, **file_entry(path)}


def main(argv: list[str] | None = None) -> int:
    """Run the command line; 0, or 2 with a message that names the fault and the remedy."""
    parser = argparse.ArgumentParser(
        prog="python -m vpmoe.data_curation.harmony.write_synth_harmony_manifest",
        description=(__doc__ or "").split("\n")[0],
    )
    parser.add_argument("--dataset-dir", type=Path, required=True)
    options = parser.parse_args(argv)
    try:
        manifest = write_conversations_manifest(options.dataset_dir)
    except VpmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{options.dataset_dir / 'manifest.json'}: {manifest['rows']:,} rows, {manifest['bytes']:,} bytes")
    return 0


if __name__ == "__main__":
    sys.exit(main())
