"""``python -m vpmoe.data_curation.harmony.write_synth_harmony_manifest --dataset-dir DIR``: conversations' manifest.

A conversion writes it itself. This checks it against the shards, and writes one for shards that have none.
"""

from __future__ import annotations

import sys

from vpmoe import cli


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return cli.main(["data", "conversations-manifest", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
