"""``python -m vpmoe.tokenizer.install``: put the rank file where every command looks for it."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from vpmoe.errors import VpmoeError
from vpmoe.tokenizer import rank_file


def main() -> int:
    """Install the rank file and say where; exit code 2 with a remedy if there is no trustworthy source."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=rank_file.DEFAULT_DIRECTORY)
    parser.add_argument("--tokenizer-model", type=Path, help="take this rank file instead of the package bpe-openai's")
    arguments = parser.parse_args()
    try:
        path = rank_file.install(arguments.output_dir, configured=arguments.tokenizer_model)
    except VpmoeError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{path}: sha256 {rank_file.SHA256} checked")
    return 0


if __name__ == "__main__":
    sys.exit(main())
