"""Build token files from plain text; all the work is in vpmoe.data_curation."""

import sys

from vpmoe.data_curation.datasets.sequential_command import healing_text

if __name__ == "__main__":
    sys.exit(healing_text())
