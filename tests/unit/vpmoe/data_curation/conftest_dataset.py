"""What the fixture dataset is built with, and how datasets are compared."""

from pathlib import Path

from vpmoe.data_curation.datasets.plan import BuildOptions
from vpmoe.steps import RECEIPT

ROWS = 400
OPTIONS = BuildOptions(seq_len=160, valid_fraction=0.05, compact_vocab_size=512)


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a dataset by relative name, but for the receipt, which tells of time and machine."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != RECEIPT)
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}
