"""``python -m vpmoe.data_curation.harmony.synth_to_harmony``: ``vpmoe data convert`` by its older name."""

from __future__ import annotations

import sys

from vpmoe import cli


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    return cli.main(["data", "convert", *(sys.argv[1:] if arguments is None else arguments)])


if __name__ == "__main__":
    sys.exit(main())
