"""Build token files of pairs from chosen and rejected answers; all the work is in vpmoe.data_curation."""

import sys

from vpmoe.data_curation.datasets.sequential_command import preference

if __name__ == "__main__":
    sys.exit(preference())
