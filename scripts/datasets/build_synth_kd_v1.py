"""Build token files from Harmony conversations; all the work is in vpmoe.data_curation."""

import sys

from vpmoe.data_curation.datasets.kd_command import main

if __name__ == "__main__":
    sys.exit(main())
