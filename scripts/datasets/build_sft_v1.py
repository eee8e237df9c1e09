"""Build token files from chat rows; all the work is in vpmoe.data_curation."""

import sys

from vpmoe.data_curation.datasets.sequential_command import sft

if __name__ == "__main__":
    sys.exit(sft())
