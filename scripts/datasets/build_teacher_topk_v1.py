"""``vpmoe data score`` under the name that users of the design know."""

import sys

from vpmoe.cli import main

if __name__ == "__main__":
    sys.exit(main(["data", "score", *sys.argv[1:]]))
